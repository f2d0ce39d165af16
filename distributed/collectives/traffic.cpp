#include "distributed/collectives/traffic.h"

#include "core/error.h"

namespace drrl {

double bus_factor(const std::string& operation, int64_t members) {
  const auto n = static_cast<double>(members);
  if (operation == "all_reduce") {
    return 2 * (n - 1) / n;
  }
  if (operation == "all_gather" || operation == "reduce_scatter" || operation == "all_to_all") {
    return (n - 1) / n;
  }
  check(ErrorKind::kInternal, operation == "broadcast", "no bus factor is known for '", operation,
        "'");
  return 1;
}

void Traffic::add(const std::string& group, const std::string& operation, const Entry& entry) {
  const std::lock_guard lock(mutex_);
  Entry& sum = entries_[{group, operation}];
  sum.calls += entry.calls;
  sum.sent_bytes += entry.sent_bytes;
  sum.waited_ms += entry.waited_ms;
}

Traffic::Entries Traffic::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(entries_, {});
}

}  // namespace drrl
