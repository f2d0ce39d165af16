#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <string>

#include "core/basis.h"
#include "core/cost.h"
#include "core/lowrank_attention.h"
#include "policy/attention.h"
#include "policy/kv_cache.h"
#include "policy/rank_policy.h"
#include "policy/statistics.h"

namespace drrl {

/// Bases of far pairs of one layer, [B G pairs, d, d] each, pair innermost.
struct FarBases {
  Basis scores;
  Basis values;
};

/// Grams of each pair's left node, then the closed form: strictly causal bases, each made from the very keys that it compresses.
/// Solves only for what is asked for. Shapes as in lowrank_attention.
FarBases solve_far_bases(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o, const BlockTree& tree,
                         bool scores, bool values);

/// The same from Grams that are there already.
FarBases solve_far_bases(const PairGrams& grams, const at::Tensor& w_o, bool scores, bool values);

struct LayerPlan {
  c10::intrusive_ptr<LowRankPlan> lowrank;  ///< null: exact attention
};

/// The near + sinks + far attention of a model: per call and layer, ask the policy for ranks, solve the bases they need, run the operator.
class LowRankController final : public AttentionController {
 public:
  LowRankController(std::shared_ptr<RankPolicy> policy, Geometry geometry);

  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                    std::shared_ptr<LayerPlan>& plan) override;

  /// A cache that holds far tokens at the policy's ranks; under an exact policy a plain one.
  std::unique_ptr<KvCache> make_cache(int64_t layers, int64_t horizon) const override;
  at::Tensor extend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o, KvCache& cache) override;

  /// Wall time of forward calls, on CUDA with a synchronization around each: for evaluation, not for training.
  void set_timing(bool on) { timing_ = on; }

  /// What was spent since the last call.
  AttentionStatistics take_statistics();
  const std::shared_ptr<RankPolicy>& policy() const { return policy_; }
  void set_policy(std::shared_ptr<RankPolicy> policy) { policy_ = std::move(policy); }

  /// One line for banners.
  std::string describe() const;

 private:
  /// Ranks and bases of one far pair of the cache's horizon: what `attend` decides for it when it sees the whole sequence.
  NodeFactors decide_node(int64_t layer, const BlockTree& horizon, int64_t level, int64_t pair, const PairGrams& grams, const at::Tensor& w_o);

  std::shared_ptr<RankPolicy> policy_;
  Geometry geometry_;
  bool timing_ = false;
  AttentionStatistics statistics_;
};

}  // namespace drrl
