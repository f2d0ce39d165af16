#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace drrl {

/// Bytes that each of `members` processes must send for a byte of message, at best: 2 (n - 1) / n
/// for all_reduce, (n - 1) / n for all_gather, reduce_scatter and all_to_all, 1 for broadcast. The
/// message is the larger of input and output of one process. nccl-tests multiplies the algorithm
/// bandwidth, message / time, by it to get the bus bandwidth, which does not depend on n where the
/// network is used well. Source: github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md. Errors:
/// Error(kInternal) for another operation.
double bus_factor(const std::string& operation, int64_t members);

/// What the collectives of this process's groups cost, by group and operation. Thread safe.
class Traffic {
 public:
  struct Entry {
    int64_t calls = 0;
    double sent_bytes = 0;  ///< message x bus_factor; of all_to_all, gather and send what this
                            ///< process does send
    double waited_ms = 0;   ///< the caller was held: start and wait. On CUDA the host's time only,
                            ///< which says nothing about the stream's
  };
  using Entries = std::map<std::pair<std::string, std::string>, Entry>;  ///< (group, operation) ->

  void add(const std::string& group, const std::string& operation, const Entry& entry);

  /// All since the last call.
  Entries take();

 private:
  std::mutex mutex_;
  Entries entries_;
};

}  // namespace drrl
