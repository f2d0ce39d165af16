#pragma once

#include "core/error.h"

namespace drrl {

/// How drrl's programs end. Under mpirun the job's exit code is that of the first rank that failed.
enum class ExitCode : int {
  kSuccess = 0,
  kUnexpected = 1,  ///< an exception that is not drrl::Error: out of memory, a tensor contract, a
                    ///< bug
  kUsage = 2,       ///< unknown flag, bad value, options that contradict each other or the model;
                    ///< processes that were given different things
  kModel = 3,  ///< model directory missing, damaged or not supported; likewise policy, trace and
               ///< latency files
  kData = 4,   ///< token file missing, damaged, too short, or with tokens beyond the vocabulary
  kCheckpoint = 5,  ///< checkpoint damaged, of another run, or not the same on all nodes
  kStorage = 6,  ///< disk full, no permission, an output that cannot be written or that another run
                 ///< writes
  kCommunication = 7,  ///< a collective failed, timed out, or ranks diverged
  kNumerics = 8,       ///< a loss or gradient that is not finite
  kInternal = 9,       ///< a broken promise inside drrl
  kInterrupted = 10,   ///< SIGTERM, SIGINT, SIGHUP or SIGUSR1: saved, and stopped; run again with
                       ///< --resume
  kHung = 11,  ///< no sign of life within --watchdog_timeout_s: the watchdog ended the process
};

constexpr ExitCode exit_code(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::kUsage: return ExitCode::kUsage;
    case ErrorKind::kModel: return ExitCode::kModel;
    case ErrorKind::kData: return ExitCode::kData;
    case ErrorKind::kCheckpoint: return ExitCode::kCheckpoint;
    case ErrorKind::kStorage: return ExitCode::kStorage;
    case ErrorKind::kCommunication: return ExitCode::kCommunication;
    case ErrorKind::kNumerics: return ExitCode::kNumerics;
    case ErrorKind::kInternal: return ExitCode::kInternal;
  }
  return ExitCode::kUnexpected;
}

}  // namespace drrl
