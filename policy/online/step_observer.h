#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "policy/attention/attention_statistics.h"

namespace drrl {

/// Somebody who follows the steps of a training: a rank policy that learns, a schedule, a clock.
/// The trainer calls a list of them, on every process in the same order.
class StepObserver {
 public:
  virtual ~StepObserver() = default;

  /// Before the first microbatch of update `step` (1, 2, ...).
  virtual void begin_step(int64_t /*step*/) {}

  /// After the last microbatch. spent: what attention cost this process in the step; whoever
  /// measures that adds it, and observers later in the list see it.
  virtual void end_step(AttentionStatistics& /*spent*/) {}

  /// Quantities for logged rows, by the keys of metric_fields(), since the last call. Every process
  /// calls, rank 0's are logged.
  virtual std::vector<std::pair<std::string, double>> figures() { return {}; }

  /// The name of the state in checkpoints, of letters and "-", of its own among the observers of a
  /// run; empty: there is none.
  virtual std::string state_name() const { return {}; }
  /// The state, any bytes. Collective over the world.
  virtual std::string save() { return {}; }
  /// Takes what `save` returned on the same process. Errors: Error(kCheckpoint).
  virtual void load(const std::string& /*state*/) {}
};

using StepObservers = std::vector<std::shared_ptr<StepObserver>>;

}  // namespace drrl
