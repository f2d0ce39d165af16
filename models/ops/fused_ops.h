#pragma once

#include <tuple>
#include <utility>

#include <ATen/ATen.h>

#include "models/ops/op_results.h"

namespace drrl {

/// The element-wise operators of a decoder layer, each one pass over memory in either direction,
/// next to the matrix products they serve. Computed in fp32 (double for double) whatever the dtype
/// of the activations: fp32, bf16, double.
///
/// Implementations with the same results: kLoops (cpu_loops.h, vectorized, multi-threaded) on CPU
/// tensors, kKernels (cuda/fused_ops.h) on CUDA tensors, kComposed (ATen operators) where there is
/// neither, and for what is too wide for a kernel.
enum class Implementation { kLoops, kKernels, kComposed };
Implementation implementation_for(const at::Tensor& x);

/// RMSNorm in front of a branch of a residual network.
///   h [N, n] -> (h, h (mean(h^2) + eps)^-1/2 weight)
/// h is passed through, so that the backward pass adds the gradient of the residual path while it
/// writes the gradient of the norm. weight [n], fp32 (double with double), a leaf; its gradient is
/// added in place (gradients.h).
std::pair<at::Tensor, at::Tensor> rms_norm(const at::Tensor& h, const at::Tensor& weight,
                                           double eps);

/// LayerNorm in front of a branch of a residual network, by ATen's kernels.
///   h [N, n] -> (h, (h - mean(h)) (var(h) + eps)^-1/2 weight + bias)
/// As rms_norm otherwise; bias like weight.
std::pair<at::Tensor, at::Tensor> layer_norm(const at::Tensor& h, const at::Tensor& weight,
                                             const at::Tensor& bias, double eps);

/// Learned positions: h [B L, n] + rows `positions` [L] int64 of `weight` [positions, n] (fp32;
/// fp64 with fp64), for each of `batch` sequences. The gradient of `weight`, a leaf, is added in
/// place.
at::Tensor add_positions(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& positions,
                         int64_t batch);

/// Queries, keys and values out of one product, rotated by their positions, contiguous as attention
/// wants them.
///   qkv [B L, (H + 2 G) d], rows [q heads | k heads | v heads]; cos, sin [L, d / 2] fp32
///   -> q [B, H, L, d], k [B, G, L, d] rotated: (a, b) -> (a cos - b sin, b cos + a sin) for pairs
///   (i, i + d / 2); v [B, G, L, d]
std::tuple<at::Tensor, at::Tensor, at::Tensor> rope_split(const at::Tensor& qkv,
                                                          const at::Tensor& cos,
                                                          const at::Tensor& sin, int64_t batch,
                                                          int64_t heads, int64_t groups);

/// The same without autograd, and their adjoints. `dh` and `weight` gradients as in cpu_loops.h.
namespace raw {

NormResult rms_norm_forward(const at::Tensor& x, const at::Tensor& weight, double eps,
                            Implementation how);

/// `dh` is added to the gradient of x; it may be undefined.
NormGradients rms_norm_backward(const at::Tensor& dy, const at::Tensor& dh, const at::Tensor& x,
                                const at::Tensor& weight, const at::Tensor& rstd,
                                Implementation how);

std::tuple<at::Tensor, at::Tensor, at::Tensor> rope_split_forward(
    const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, int64_t batch,
    int64_t heads, int64_t groups, Implementation how);
at::Tensor rope_split_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                               const at::Tensor& cos, const at::Tensor& sin, Implementation how);

/// gate_up [N, 2 n] = [gate | up] -> silu(gate) * up [N, n]
at::Tensor swiglu_forward(const at::Tensor& gate_up, Implementation how);

SwigluGradients swiglu_backward(const at::Tensor& gate_up, const at::Tensor& dy,
                                Implementation how);

/// logits [N, V] (rows may be padded) <- exp(logits - max of the row) in place; returns the maxima
/// and the sums [N] of the exponentials.
std::pair<at::Tensor, at::Tensor> exp_rows_(at::Tensor& logits, Implementation how);

/// logits [N, V] <- logits * factor [N] in place.
void scale_rows_(at::Tensor& logits, const at::Tensor& factor, Implementation how);

/// table[ids[t] - first] += x[t] for every t whose row is in the table [rows, n]; ids [N] int64, x
/// [N, n].
void scatter_add_(at::Tensor& table, const at::Tensor& ids, const at::Tensor& x, int64_t first,
                  Implementation how);

}  // namespace raw
}  // namespace drrl
