#include "launch/runtime/process.h"

#include <utility>

#include <torch/version.h>

#ifdef DRRL_WITH_MPI
#include <mpi.h>
#endif

namespace drrl {
namespace {

std::shared_ptr<Watchdog> process_watchdog;

#ifdef DRRL_WITH_MPI
std::string mpi_version() {
  char library[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  MPI_Get_library_version(library, &length);
  const std::string mpi(library, static_cast<size_t>(length));
  return mpi.substr(0, mpi.find(','));
}
#else
std::string mpi_version() {
  return "no MPI";
}
#endif

}  // namespace

std::string version_line() {
  return std::string("drrl ") + DRRL_VERSION + ", LibTorch " + TORCH_VERSION + ", " + mpi_version();
}

const std::shared_ptr<Watchdog>& watchdog() noexcept {
  return process_watchdog;
}

void set_watchdog(std::shared_ptr<Watchdog> started) noexcept {
  process_watchdog = std::move(started);
}

void sign_of_life() {
  if (process_watchdog) {
    process_watchdog->alive();
  }
}

}  // namespace drrl
