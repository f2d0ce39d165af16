#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <string>

#include "core/basis.h"
#include "core/cost.h"
#include "core/lowrank_attention.h"
#include "policy/attention.h"
#include "policy/rank_policy.h"

namespace drrl {

/// Bases of all far pairs of one layer, [B G pairs, d, d] each, pair innermost.
struct FarBases {
  Basis scores;
  Basis values;
};

/// Grams of each pair's left node, then the closed form: strictly causal bases, each made from the very keys that it compresses.
/// Solves only for what is asked for. Shapes as in lowrank_attention.
FarBases solve_far_bases(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o, const BlockTree& tree,
                         bool scores, bool values);

struct LayerPlan {
  c10::intrusive_ptr<LowRankPlan> lowrank;  ///< null: exact attention
};

/// What attention cost since the last `take_statistics()`, summed over layers and calls of this process.
struct AttentionStatistics {
  int64_t calls = 0;
  double flops = 0;        ///< spent, everything counted: near, sinks, far, projections, Grams, solves
  double exact_flops = 0;  ///< of exact causal attention on the same shapes
  double attention_ms = 0; ///< forward calls of attend(), solves included; 0 unless timing is on
  double solve_ms = 0;     ///< Grams and bases; 0 unless timing is on
  int64_t solves = 0;      ///< d x d basis problems solved
  double rank_qk = 0, rank_v = 0;  ///< sums over decisions
  int64_t decisions = 0;   ///< (sequence, KV group, pair) decisions; exact layers without far pairs make none
};

/// The near + sinks + far attention of a model: per call and layer, ask the policy for ranks, solve the bases they need, run the operator.
class LowRankController final : public AttentionController {
 public:
  LowRankController(std::shared_ptr<RankPolicy> policy, Geometry geometry);

  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                    std::shared_ptr<LayerPlan>& plan) override;

  /// Wall time of forward calls, on CUDA with a synchronization around each: for evaluation, not for training.
  void set_timing(bool on) { timing_ = on; }

  AttentionStatistics take_statistics();
  const RankPolicy& policy() const { return *policy_; }
  void set_policy(std::shared_ptr<RankPolicy> policy) { policy_ = std::move(policy); }

  /// One line for banners.
  std::string describe() const;

 private:
  std::shared_ptr<RankPolicy> policy_;
  Geometry geometry_;
  bool timing_ = false;
  AttentionStatistics statistics_;
};

}  // namespace drrl
