// LD_PRELOAD: a wall clock that is off by as many seconds as the file $DRRL_WALL_CLOCK holds, a
// double that tests/faults/study.py changes while processes run. Only readings are off, so a wait
// until some time on the wall clock ends too early or too late for good, not only across the jump.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>

namespace {

double offset() {
  static const volatile double* const seconds = [] {
    const char* path = std::getenv("DRRL_WALL_CLOCK");
    const int file = path != nullptr ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void* mapped = file >= 0 ? mmap(nullptr, sizeof(double), PROT_READ, MAP_SHARED, file, 0)
                             : MAP_FAILED;
    if (file >= 0) {
      close(file);
    }
    return mapped == MAP_FAILED ? nullptr : static_cast<const volatile double*>(mapped);
  }();
  return seconds != nullptr ? *seconds : 0;
}

}  // namespace

extern "C" int clock_gettime(clockid_t clock, timespec* now) noexcept {
  const long result = syscall(SYS_clock_gettime, clock, now);
  if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
    now->tv_sec += static_cast<time_t>(std::llround(offset()));
  }
  return static_cast<int>(result);
}

extern "C" int gettimeofday(timeval* now, void* /*zone*/) noexcept {
  timespec t{};
  const int result = clock_gettime(CLOCK_REALTIME, &t);
  now->tv_sec = t.tv_sec;
  now->tv_usec = t.tv_nsec / 1000;
  return result;
}

extern "C" time_t time(time_t* now) noexcept {
  timespec t{};
  clock_gettime(CLOCK_REALTIME, &t);
  if (now != nullptr) {
    *now = t.tv_sec;
  }
  return t.tv_sec;
}
