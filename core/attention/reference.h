#pragma once

#include <ATen/ATen.h>

#include "core/attention/lowrank_attention.h"

namespace drrl::reference {

/// The obvious form of lowrank_attention, the oracle of every fast path: full L x L scores of every
/// head, far entries replaced by (q P_q)(k P_k)^T one pair at a time, one softmax, values of far
/// pairs through P_v P_o^T. Differentiable by plain autograd, any floating dtype. O(L^2) memory.
at::Tensor lowrank_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const LowRankPlan& plan);

/// softmax(q k^T / sqrt(d) + causal mask) v, written out.
at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

}  // namespace drrl::reference
