#pragma once

#include <memory>

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>

#include "core/types/lowrank_plan.h"
#include "distributed/attention/context_attention.h"

namespace drrl {

struct DamageSample;

/// What one call of `AttentionController::attend` decided. A model keeps it between a forward pass
/// and its recomputation under activation checkpoints.
struct LayerPlan {
  /// The attention that was decided, by whichever operator it needs: q [B, H, L, d], k and v
  /// [B, G, L, d] -> [B, H, L, d], differentiable.
  /// far, if given, <- what was exact or dropped.
  at::Tensor run(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 FarServed* far = nullptr) const;

  c10::intrusive_ptr<LowRankPlan> lowrank;  ///< null: exact attention
  c10::intrusive_ptr<ContextPlan> context;  ///< under context parallelism, instead
  FarServed served;                         ///< what was exact or dropped in the pass that decided
  std::shared_ptr<const DamageSample> sample;  ///< rows to measure in the backward pass; null: none
};

}  // namespace drrl
