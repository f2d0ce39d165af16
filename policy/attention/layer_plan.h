#pragma once

#include <memory>

#include <c10/util/intrusive_ptr.h>

#include "core/types/lowrank_plan.h"
#include "distributed/attention/context_attention.h"

namespace drrl {

struct DamageSample;

/// What one call of `AttentionController::attend` decided. A model keeps it between a forward pass
/// and its recomputation under activation checkpoints.
struct LayerPlan {
  c10::intrusive_ptr<LowRankPlan> lowrank;     ///< null: exact attention
  c10::intrusive_ptr<ContextPlan> context;     ///< under context parallelism, instead
  std::shared_ptr<const DamageSample> sample;  ///< rows to measure in the backward pass; null: none
};

}  // namespace drrl
