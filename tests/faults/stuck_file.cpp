// LD_PRELOAD: a file system that does not answer. pread of a file whose path ends in
// $DRRL_STUCK_FILE never returns; with $DRRL_SLOW_MS it returns so much later, with at most a
// hundredth of a megabyte. In the process of rank $DRRL_STUCK_RANK alone, if that is set.

#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>

namespace {

bool is_stuck(int descriptor) {
  const char* name = std::getenv("DRRL_STUCK_FILE");
  const char* rank = std::getenv("DRRL_STUCK_RANK");
  const char* own = std::getenv("OMPI_COMM_WORLD_RANK");
  if (name == nullptr || (rank != nullptr && (own == nullptr || std::string_view(rank) != own))) {
    return false;
  }
  char path[4096];
  const ssize_t length = readlink(("/proc/self/fd/" + std::to_string(descriptor)).c_str(), path,
                                  sizeof(path));
  return length > 0 && std::string_view(path, static_cast<size_t>(length)).ends_with(name);
}

}  // namespace

extern "C" ssize_t pread(int descriptor, void* to, size_t bytes, off_t offset) {
  using Pread = ssize_t (*)(int, void*, size_t, off_t);
  static const auto next = reinterpret_cast<Pread>(dlsym(RTLD_NEXT, "pread"));
  if (is_stuck(descriptor)) {
    const char* slow = std::getenv("DRRL_SLOW_MS");
    while (slow == nullptr) {
      pause();
    }
    usleep(static_cast<useconds_t>(1000 * std::atoi(slow)));
    bytes = std::min(bytes, size_t{10'000});
  }
  return next(descriptor, to, bytes, offset);
}

extern "C" ssize_t pread64(int descriptor, void* to, size_t bytes, off_t offset) {
  return pread(descriptor, to, bytes, offset);
}
