#pragma once

#include <ATen/ATen.h>

#include "core/attention/lowrank_attention.h"

namespace drrl::reference {

/// lowrank_attention written out, the oracle of every fast path: one head after the other, all L x
/// L scores at once.
///
///   s_ij = q_i k_j / sqrt(d)                                      near and sinks
///   s_ij = (q_i P_q)(k_j P_k) / sqrt(d) + || q_i F ||^2           far
///   w    = softmax over j <= i of s
///   o_i  = sum over near and sinks of w_ij v_j + sum over far of w_ij v_j P_v P_o^T
///
/// An entry (i, j) of a far pair with a gate is exact after all, score and value, if its weight is
/// at least `gate` of what the row has met so far (kGateChunk). A tile that a row does not keep
/// (kTileRows) has no weight.
///
/// Shapes as in lowrank_attention. Differentiable by plain autograd, any floating dtype. O(L^2)
/// memory.
at::Tensor lowrank_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const LowRankPlan& plan);

/// softmax(q k^T / sqrt(d) + causal mask) v, written out.
at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

}  // namespace drrl::reference
