#pragma once

#include <cstdint>

#include <ATen/ATen.h>

namespace drrl {

/// What a changed output of attention does to the loss, by the Fisher information.
///
/// With labels drawn from the model's own distribution, the gradient g of sum_t -log p(y_t) with
/// respect to a layer's attention output is a score vector, and E[g g^T] is the curvature of
/// KL(exact || perturbed). So an error D of a token's output costs 1/2 E[(g . D)^2], here with
/// one draw of the labels. The heads of a KV group err together: g . D is their sum.
///
/// moved [.., heads rows]: g . D of each head and row, heads outermost, with gradients of a loss
/// that is `scale` times too small. Returns [.., rows], in nats.
inline at::Tensor loss_increase(const at::Tensor& moved, int64_t heads, double scale = 1) {
  return 0.5 * moved.unflatten(-1, {heads, moved.size(-1) / heads}).sum(-2).mul(scale).square();
}

}  // namespace drrl
