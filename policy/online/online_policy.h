#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "distributed/collectives/reward_channel.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/calibration/damage_sampler.h"
#include "policy/online/online_trainer.h"
#include "policy/online/step_observer.h"

namespace drrl {

/// Online training of a rank policy while its model is fine-tuned ("online updates", arXiv
/// 2512.15973), on every process the same object:
///
///   each step      the sampler measures damages of all ranks on a few rows of the text at hand;
///                  the controller's ms and guard counters add up
///   every N steps  each process sends what it has to the OnlineTrainer on rank 0 (RewardChannel),
///                  and goes on
///   N steps later  all processes take the factors that came back, and decide by them from the next
///                  step on
///
/// So an update has N steps of time to travel and to be computed, and all processes change their
/// decisions at the same step whatever the speed of anyone: decisions are alike and runs can be
/// repeated. That they are alike is checked by the trainer, off the critical path: records name the
/// factors in effect.
class OnlinePolicy final : public StepObserver {
 public:
  struct Options {
    int64_t update_every = 1;  ///< N [steps]
    DamageSampler::Options sampling;
    /// The ranks that a calibration's damages lead to, for figures on rank 0; empty: no such
    /// figures.
    std::function<RankTable(const Calibration&)> allocate;
  };

  /// Collective over `channel`, a group of its own of all processes. The controller's policy must
  /// decide by `calibration` (RankPolicy::set_calibration). first_group, groups: this process's KV
  /// groups. Errors: Error(kUsage) for sequences split over processes, processes that share a KV
  /// head, or update_every < 1.
  OnlinePolicy(std::shared_ptr<LowRankController> controller, Calibration calibration,
               int64_t first_group, int64_t groups, at::Device device, Group channel,
               Options options);

  void begin_step(int64_t step) override;
  /// Of the step begun last; spent: by the controller in it. Errors: what the trainer found, such
  /// as Error(kCommunication) when processes do not agree.
  void end_step(AttentionStatistics& spent) override;
  /// Applies what is still under way: after the last step. Collective.
  void finish();

  /// Everything that the next step depends on, and back: on the same layout decisions go on bit for
  /// bit. On another layout factors and the trainer's knowledge go on, while samples that had not
  /// been sent are dropped, and which rows are drawn later may differ. Collective; waits for the
  /// round under way.
  std::string save() override;
  void load(const std::string& state) override;
  std::string state_name() const override { return "online-policy"; }

  /// By the keys of metric_fields(); the same on every process but for times.
  std::vector<std::pair<std::string, double>> figures() override;

  /// The calibration by which decisions are made now.
  Calibration calibration() const { return scaled(calibration_, factors_); }
  int64_t updates() const;

 private:
  at::Tensor record() const;
  at::Tensor train(const std::vector<at::Tensor>& records);
  void receive();
  void apply_received();

  std::shared_ptr<LowRankController> controller_;
  Calibration calibration_;
  int64_t first_group_, groups_;
  Options options_;
  bool on_cpu_;
  std::shared_ptr<DamageSampler> sampler_;
  OnlineTrainer trainer_;               // rank 0's is used
  at::Tensor factors_;                  // in effect
  at::Tensor figures_;                  // that came with them
  std::optional<at::Tensor> received_;  // message that is not in effect yet
  AttentionStatistics spent_;           // since the last record
  double steps_ = 0;                    // likewise, those of layer_ms
  double waited_ms_ = 0;                // as figures() last said
  int64_t step_ = 0;
  int64_t world_rank_, world_size_;
  RewardChannel channel_;  // last: its thread uses the others
};

}  // namespace drrl
