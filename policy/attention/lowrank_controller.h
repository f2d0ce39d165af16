#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "core/attention/far_bases.h"
#include "core/attention/flops.h"
#include "core/attention/kv_cache.h"
#include "core/types/basis.h"
#include "core/types/lowrank_plan.h"
#include "distributed/attention/context_attention.h"
#include "distributed/attention/shared_heads.h"
#include "policy/attention/attention_controller.h"
#include "policy/attention/attention_statistics.h"
#include "policy/attention/layer_plan.h"
#include "policy/calibration/damage_sampler.h"
#include "policy/rank_policy.h"

namespace drrl {

/// How the bases of far pairs are made.
struct BasisOptions {
  /// Rounds of `update_basis` from the starting bases; kSolve: a full decomposition for each pair
  /// instead.
  int64_t update_steps = 2;
  /// Starting bases, [layers, G, 2, d, d] of this process' KV groups (Calibration::bases);
  /// undefined: from each sequence's first block, or solved in full if that has fewer tokens than
  /// d.
  at::Tensor start;

  static constexpr int64_t kSolve = -1;
};

/// The guard over decisions ("actions whose certified loss exceeds eps are masked", arXiv
/// 2512.15973): a pair's rank is raised to the smallest bucket at which the starting bases lose at
/// most the share eps of the root of the energy, by start_loss; updates only lose less. Full rank
/// is always allowed.
struct GuardOptions {
  double eps = 0;                     ///< 0: no guard
  std::vector<int64_t> buckets = {};  ///< ascending, head_dim the last
};

/// What a study leaves out of the method, to see what it is worth.
struct Ablation {
  bool residual = false;  ///< the correction of far log-sum-exps by what projected scores lack
                          ///< (LowRankPlan::residual); its operations are counted all the same
  bool mass = false;      ///< the weights of keys and values in the Grams of a sequence
                          ///< (attention_mass); starting bases are what they are
};

/// The near + sinks + far attention of a model: per call and layer, ask the policy for ranks, make
/// the bases they need, run the operator.
class LowRankController final : public AttentionController {
 public:
  /// first_group: the first of this process' KV groups among the model's, under tensor parallelism.
  /// A guard needs starting bases. context: the processes that each sequence is split over; then
  /// Error(kUsage) for a guard and for policies that look at Grams (`energy`, `rl`), of which no
  /// process has all, and `attend` for gates, when a policy chooses some. kv: the tensor-parallel
  /// processes that hold the same KV head (Mesh::kv).
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
  void set_timing(bool on) { timing_ = on; }

  /// The guard's eps from now on; only if there was one.
  void set_guard_eps(double eps) { guard_.eps = eps; }

  /// From now on, in `attend`. Errors: Error(kUsage) under context parallelism.
  void leave_out(Ablation ablation);

  /// Whether other processes hold this one's KV head, too.
  bool shares_kv_head() const { return shared_.shared(); }

  /// Measures damages while the model is trained, whenever it is active; null: nobody does. Not
  /// under context parallelism, nor where a KV head is shared.
  void set_sampler(std::shared_ptr<DamageSampler> sampler) { sampler_ = std::move(sampler); }

  /// What was spent since the last call.
  AttentionStatistics take_statistics();

  /// 64-bit hash of the policy's description and of every rank decided since the last call: what
  /// processes that hold the same layers compare (check_agreement) if their policy does not look at
  /// the text. Processes that share a sequence or KV head call it alike: `split` compares what they
  /// have.
  uint64_t take_decisions_digest();

  const std::shared_ptr<RankPolicy>& policy() const { return policy_; }
  void set_policy(std::shared_ptr<RankPolicy> policy) { policy_ = std::move(policy); }
  const BasisOptions& bases() const { return bases_; }

  /// One line for banners.
  std::string describe() const;

 private:
  /// Bases as the options say. `start` [B G, 2, d, d] is where updates start from; if it is
  /// undefined it becomes the calibration's, or made from the first of these pairs.
  FarBases make_bases(int64_t layer, const PairGrams& grams, const at::Tensor& w_o,
                      const std::vector<Ranks>& ranks, at::Tensor& start);

  /// `attend` of a split sequence.
  at::Tensor attend_split(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& v, const at::Tensor& w_o, LayerPlan& plan);

  /// Makes this process' share of the bases and plan.context, with what it needs of all bases.
  /// ranks <- those at which pairs are attended. Returns the cost.
  FarBases make_split_plan(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                           const at::Tensor& v, const at::Tensor& w_o, std::vector<Ranks>& ranks,
                           LayerPlan& plan);

  /// Whether updates start from bases of the sequence's first pair.
  bool starts_from_first_pair(int64_t head_dim) const;

  /// Asks the policy, showing it what it wants to see, and counts its decisions. bases <- those
  /// that were made for it, if any, and the operations.
  std::vector<Ranks> decide(LayerObservation& observation, const PairGrams& grams,
                            const at::Tensor& w_o, FarBases& bases);

  void raise_to_guard(const LayerObservation& observation, const PairGrams& grams,
                      const at::Tensor& w_o, std::vector<Ranks>& ranks, FarBases& bases);

  /// Ranks and bases of one far pair of the cache's horizon: what `attend` decides for it when it
  /// sees the whole sequence.
  NodeFactors decide_node(int64_t layer, LayerCache& cache, int64_t level, int64_t pair,
                          const PairGrams& grams, const at::Tensor& w_o);

  /// Counts pairs that no low rank serves.
  void count_exact(int64_t pairs);

  /// Counts a call of attend.
  void spent(int64_t layer, double ms);

  std::shared_ptr<RankPolicy> policy_;
  Geometry geometry_;
  BasisOptions bases_;
  int64_t first_group_;
  GuardOptions guard_;
  Group context_;
  SharedHeads shared_;
  std::optional<SequenceSplit> split_;  // of the pass under way
  Ablation ablation_;
  std::shared_ptr<DamageSampler> sampler_;
  double first_eps_;  // as constructed, for describe()
  bool timing_ = false;
  AttentionStatistics statistics_;
  uint64_t decisions_digest_ = 0;
};

}  // namespace drrl
