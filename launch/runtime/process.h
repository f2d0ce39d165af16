#pragma once

#include <memory>
#include <string>

#include "distributed/collectives/watchdog.h"

/// What everything in a program may ask of its process.
namespace drrl {

/// "drrl 0.1.0, LibTorch 2.11.0, Open MPI v4.1.4".
std::string version_line();

/// The watchdog of this process, which run_program starts as --watchdog_timeout_s says; null: off.
/// It ends the process with ExitCode::kHung, saying what hung. It watches the start and the end of
/// MPI; programs hand it to their groups and trainer.
const std::shared_ptr<Watchdog>& watchdog() noexcept;

/// Makes it; null: off.
void set_watchdog(std::shared_ptr<Watchdog> started) noexcept;

/// A sign of life for it. Reading and writing files gives one for each piece.
void sign_of_life();

}  // namespace drrl
