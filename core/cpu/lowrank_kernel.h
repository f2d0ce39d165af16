#pragma once

#include <tuple>

#include <ATen/ATen.h>

#include "core/types/lowrank_plan.h"

namespace drrl::cpu {

/// Whether the fused kernel runs this: float32 on a CPU with AVX2 and FMA, head_dim and all ranks
/// multiples of 16.
bool lowrank_available(const at::Tensor& q, const LowRankPlan& plan);

/// lowrank_attention in one pass over the query rows: sinks, near block and every far pair that a
/// row sees go through one running softmax, queries are projected and far outputs expanded in the
/// cache, and nothing but packed keys and values is written in between. Shapes as in
/// lowrank_attention. context <- what the backward pass needs to know.
/// Returns out [B, H, L, d] and its log-sum-exp [B, H, L].
std::tuple<at::Tensor, at::Tensor> lowrank_forward(const at::Tensor& q, const at::Tensor& k,
                                                   const at::Tensor& v, const LowRankPlan& plan,
                                                   LowRankContext& context);

/// Its gradients in q, k and v: near blocks and sinks first, then one tree level at a time, so that
/// only one level's projections are held.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lowrank_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& logsumexp, const LowRankPlan& plan,
    const LowRankContext& context);

}  // namespace drrl::cpu
