#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "core/attention/kv_cache.h"
#include "core/types/attention_call.h"
#include "distributed/attention/basis_provider.h"
#include "distributed/topology/sequence_split.h"
#include "policy/attention/attention_controller.h"
#include "policy/attention/attention_recorder.h"
#include "policy/attention/layer_plan.h"
#include "policy/attention/rank_decider.h"
#include "policy/calibration/damage_sampler.h"

namespace drrl {

/// What a study leaves out of the method, to see what it is worth.
struct Ablation {
  bool residual = false;  ///< the correction of far log-sum-exps by what projected scores lack
                          ///< (LowRankPlan::residual); its operations are counted all the same
  bool mass = false;      ///< the weights of keys and values in the Grams of a sequence
                          ///< (attention_mass); starting bases are what they are
};

/// The near + sinks + far attention of a model. For each call and layer it asks RankDecider for
/// ranks, BasisProvider for the bases they need, runs the operator (LayerPlan::run), and tells
/// AttentionRecorder what that took.
class LowRankController final : public AttentionController {
 public:
  /// first_group: the first of this process's KV groups among the model's, under tensor
  /// parallelism. A guard needs starting bases. context: the processes that each sequence is split
  /// over; then Error(kUsage) for a guard and for policies that look at Grams (`energy`, `rl`), of
  /// which no process has all, and `attend` for gates, when a policy chooses some. kv: the
  /// tensor-parallel processes that hold the same KV head (Mesh::kv).
  LowRankController(std::shared_ptr<RankPolicy> policy, Geometry geometry, BasisOptions bases = {},
                    int64_t first_group = 0, GuardOptions guard = {}, Group context = {},
                    Group kv = {});

  /// Collective over the processes that share a sequence, and over those that share a KV head:
  /// checks first that they decided alike so far and will (check_agreement), as ranks say what
  /// travels.
  at::Tensor split(int64_t length) override;
  const Group& context() const override { return context_; }

  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) override;

  /// A cache that holds far tokens at the policy's ranks; under an exact policy a plain one.
  /// Errors: Error(kUsage) under context parallelism, and if anything is left out.
  std::unique_ptr<KvCache> make_cache(int64_t layers, int64_t horizon) const override;
  at::Tensor extend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o, KvCache& cache) override;

  /// Wall time of forward calls, on CUDA with a synchronization around each: for evaluation, not
  /// for training.
  void set_timing(bool on) { recorder_.set_timing(on); }

  /// The guard's eps from now on; only if there was one.
  void set_guard_eps(double eps) { decider_.set_guard_eps(eps); }

  /// From now on, in `attend`. Errors: Error(kUsage) under context parallelism.
  void leave_out(Ablation ablation);

  /// Whether other processes hold this one's KV head, too.
  bool shares_kv_head() const { return kv_.size() > 1; }

  /// Measures damages while the model is trained, whenever it is active; null: nobody does. Not
  /// under context parallelism, nor where a KV head is shared.
  void set_sampler(std::shared_ptr<DamageSampler> sampler) { sampler_ = std::move(sampler); }

  /// What was spent since the last call.
  AttentionStatistics take_statistics() { return recorder_.take(); }

  /// 64-bit hash of the policy's description and of every rank decided since the last call: what
  /// processes that hold the same layers compare (check_agreement) if their policy does not look at
  /// the text. Processes that share a sequence or KV head call it alike: `split` compares what they
  /// have.
  uint64_t take_decisions_digest() { return decider_.take_digest(describe()); }

  const std::shared_ptr<RankPolicy>& policy() const { return decider_.policy(); }
  void set_policy(std::shared_ptr<RankPolicy> policy) { decider_.set_policy(std::move(policy)); }
  const BasisOptions& bases() const { return provider_->options(); }

  /// One line for banners.
  std::string describe() const;

 private:
  /// What a layer is attended at, and what it took to make.
  struct Planned {
    std::vector<Ranks> ranks = {};
    double flops = 0;  ///< of decisions and bases
  };

  void check_call(const AttentionCall& call) const;

  /// Decides and makes bases for a call, into `plan`: of a whole sequence, and of this process's
  /// rows of a split one.
  Planned plan_layer(const AttentionCall& call, LayerPlan& plan);
  Planned plan_split_layer(const AttentionCall& call, LayerPlan& plan);

  /// Asks the decider, and counts.
  RankDecision decide(LayerObservation& observation, const PairGrams& grams, const at::Tensor& w_o);

  /// Ranks and bases of one far pair of the cache's horizon: what `attend` decides for it when it
  /// sees the whole sequence. grams: of own query heads.
  NodeFactors decide_node(int64_t layer, LayerCache& cache, int64_t level, int64_t pair,
                          const PairGrams& grams, const at::Tensor& w_o);

  Geometry geometry_;
  int64_t first_group_;
  Group context_, kv_;
  std::unique_ptr<BasisProvider> provider_;
  RankDecider decider_;
  AttentionRecorder recorder_;
  std::shared_ptr<DamageSampler> sampler_;
  std::optional<SequenceSplit> split_;  // of the pass under way
  Ablation ablation_;
};

}  // namespace drrl
