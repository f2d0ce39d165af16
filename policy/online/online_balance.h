#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "distributed/collectives/group.h"
#include "policy/allocation/straggler_balance.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/online/step_observer.h"

namespace drrl {

/// Balances ranks over tensor-parallel processes by speeds that are measured while a model is
/// trained: forward attention, cost of the own ranks over time taken.
///
///   each step      a process notes its speed
///   every N steps  one all-gather of the medians, at the end of a step, where a sum over all
///                  processes waits anyway; everybody then computes the same ranks, which are in
///                  effect from the next step on if they save enough
///
/// Members of a group have the same ranks; data-parallel replicas need not: each balances itself,
/// as its members wait for each other at every layer, and one without a slow process keeps the
/// plain ranks. Runs depend on measured times and cannot be repeated bit for bit; nothing is kept
/// in checkpoints, as a resumed job may run elsewhere: it starts with the plain ranks and measures
/// anew.
class OnlineBalance final : public StepObserver {
 public:
  /// New ranks must save this share of the time that attention takes with those in effect: less is
  /// noise, and new shapes cost something on a GPU.
  static constexpr double kWorthwhile = 0.02;

  /// balance: of processes that are the members of `tp`, in their order. Errors: Error(kUsage) for
  /// every < 1, and if sequences are split over processes or a KV head is shared by some, which
  /// then wait for each other within attention.
  OnlineBalance(std::shared_ptr<LowRankController> controller, RankBalance balance, Group tp,
                int64_t every, bool on_cpu);

  void begin_step(int64_t step) override;
  /// Of the step begun last; spent: by the controller in it. Collective over `tp`.
  void end_step(AttentionStatistics& spent) override;

  /// By the keys of metric_fields().
  std::vector<std::pair<std::string, double>> figures() override;
  /// In effect now.
  const BalancedRanks& ranks() const { return ranks_; }
  /// Those that the ranks in effect were made for, the fastest 1, in hundredths; empty: they are
  /// the plain ones.
  const std::vector<double>& speeds() const { return speeds_; }

 private:
  std::shared_ptr<LowRankController> controller_;
  RankBalance balance_;
  Group tp_;
  int64_t every_;
  bool on_cpu_;
  BalancedRanks ranks_;
  std::vector<double> speeds_, measured_;  // measured_: the newest
  std::vector<double> samples_;            // own speed, of the steps since the last exchange
  int64_t step_ = 0;
  bool warm_ = false;
};

}  // namespace drrl
