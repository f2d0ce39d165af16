#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>

#include "core/types/block_tree.h"
#include "core/types/lowrank_plan.h"

namespace drrl {

/// Near + sinks + far attention of one layer, one softmax over all three.
///
///   near   softmax-terms of q k^T / sqrt(d) over each token's own block (causal) and the sinks,
///          exact
///   far    scores (q P_q)(k P_k)^T / sqrt(d) + || q F ||^2 at rank r, values v P_v at rank r_v,
///          expanded once per row by P_o^T
///
/// F is the pair's residual factor (basis.h): what the projected scores lack in the softmax'
/// denominator, to second order. The parts are merged by their log-sum-exp; the backward hands the
/// merged log-sum-exp and rowsum(grad * out) to each part (exact_attention.h). Ranks, bases and the
/// correction by F are constants: no gradient flows through them.
///
/// q [B, H, L, d], k and v [B, G, L, d], L = plan.tree.sequence_length(); float32, float64 (CPU),
/// bfloat16. returns [B, H, L, d] of q's dtype, differentiable in q, k, v. With all ranks d it is
/// exact_attention, at its cost. served, if given, <- what was exact or
/// dropped. Errors:
/// c10::Error on shapes that disagree with each other or with the plan, and on ranks outside 1..d.
at::Tensor lowrank_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const c10::intrusive_ptr<LowRankPlan>& plan,
                             FarServed* served = nullptr);

/// The near part alone, one softmax over it: out [B, H, L, d] and its log-sum-exp [B, H, L]
/// (float32; float64 for float64) <- each token over its own block, the sinks over themselves. For
/// operators that merge it with parts of their own.
void near_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const BlockTree& tree, const at::Tensor& out, const at::Tensor& logsumexp);

/// grad_q, grad_k, grad_v <- its gradients, written, given the merged log-sum-exp and delta
/// (exact_attention.h), [B, H, L] each.
void near_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v, const BlockTree& tree,
                             const at::Tensor& logsumexp, const at::Tensor& delta,
                             const at::Tensor& grad_q, const at::Tensor& grad_k,
                             const at::Tensor& grad_v);

}  // namespace drrl
