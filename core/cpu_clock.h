#pragma once

#include <ctime>

namespace drrl {

/// Processor time [ms] that has passed on CLOCK_THREAD_CPUTIME_ID or CLOCK_PROCESS_CPUTIME_ID: no
/// wait for a core or for another process is in it.
inline double cpu_ms(clockid_t clock) {
  timespec now{};
  clock_gettime(clock, &now);
  return 1e3 * static_cast<double>(now.tv_sec) + 1e-6 * static_cast<double>(now.tv_nsec);
}

}  // namespace drrl
