#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "policy/attention/attention_statistics.h"

namespace drrl {

/// How the trainer talks to a rank policy that wants to know about steps. Every member may be
/// empty.
struct PolicyHooks {
  std::function<void(int64_t step)>
      begin_step;  ///< before the first microbatch of update `step` (1, 2, ...)
  std::function<AttentionStatistics()>
      end_step;  ///< after the last one: what this rank spent in it
  std::function<void(bool evaluating)> evaluation;  ///< around validation: do not learn from it
  /// Quantities for logged rows, by the keys of metric_fields(), since the last call; every rank
  /// calls, rank 0's are logged.
  std::function<std::vector<std::pair<std::string, double>>()> figures;
  std::function<std::string()>
      save;  ///< state for a checkpoint, any bytes; collective over the world
  std::function<void(const std::string& state)> load;  ///< what save returned on the same rank
};

}  // namespace drrl
