#pragma once

#include <ATen/ATen.h>

#include "core/attention/lowrank_attention.h"

namespace drrl::reference {

/// The obvious form of lowrank_attention, the oracle of every fast path. Forms the L x L scores of
/// every head. Replaces those of a far pair by (q P_q)(k P_k)^T, plus the residual if the plan has
/// one. Applies gates: entries that pass keep their exact scores and values. Takes one softmax, and
/// the other values of far pairs through P_v P_o^T. Shapes: q [B, H, L, d], k and v [B, G, L, d],
/// result [B, H, L, d]. Differentiable by plain autograd, any floating dtype. O(L^2) memory.
at::Tensor lowrank_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const LowRankPlan& plan);

/// softmax(q k^T / sqrt(d) + causal mask) v, written out.
at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

}  // namespace drrl::reference
