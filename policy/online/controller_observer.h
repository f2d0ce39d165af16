#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "policy/attention/lowrank_controller.h"
#include "policy/online/step_observer.h"

namespace drrl {

/// Follows steps for a controller: its statistics of each step, a guard that tightens, and a
/// checkpoint that says by which policy a run decides. First in the list of observers, as others
/// want the statistics.
class ControllerObserver final : public StepObserver {
 public:
  /// The guard's eps in step n is guard_eps * guard_decay^(n - 1).
  ControllerObserver(std::shared_ptr<LowRankController> controller, double guard_eps,
                     double guard_decay);

  void begin_step(int64_t step) override;
  void end_step(AttentionStatistics& spent) override;

  std::string state_name() const override { return "rank-policy"; }
  /// The policy in words. Bases are made anew from each sequence, so a resumed run needs no more
  /// than the same decisions.
  std::string save() override { return description_; }
  /// Errors: Error(kCheckpoint) for the state of another policy.
  void load(const std::string& state) override;

  const std::string& description() const { return description_; }

 private:
  std::shared_ptr<LowRankController> controller_;
  double guard_eps_, guard_decay_;
  std::string description_;
};

}  // namespace drrl
