#pragma once

#include <ATen/ATen.h>

#include "core/block_tree.h"

namespace drrl {

/// Gram matrices of the key side of every far pair: what its bases are made from, and all that they may be made from. Queries,
/// keys and values of the *left* node only, so that nothing a query sees depends on a token after it. Sinks are left out.
struct PairGrams {
  at::Tensor queries;  ///< G_q = sum over the group's heads of Q^T Q, [B, G, pairs, d, d]
  at::Tensor keys;     ///< G_k = K^T K, [B, G, pairs, d, d]
  at::Tensor values;   ///< G_v = V^T V, [B, G, pairs, d, d]
};

/// Computes the Grams of all far pairs of one layer: one product per block, then sums up the tree.
///
/// q [B, H, L, d], k and v [B, G, L, d] with G dividing H; any floating dtype, any device.
/// returns float32 accumulated by matrix products of at least float32, then summed in float64: float64 tensors.
/// Errors: c10::Error if a shape disagrees with the tree or with another.
PairGrams pair_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const BlockTree& tree);

/// X^T X of all rows of x, summed over the heads of each of `groups` groups: one product for each run of `rows` tokens, which L is a multiple of, summed
/// in float64, as pair_grams does. x [B, H, L, d] -> float64 [B, groups, d, d].
at::Tensor token_gram(const at::Tensor& x, int64_t groups, int64_t rows);

/// G_o = sum over the heads of each KV group of W_O^T W_O: how much a direction of the attention output weighs in the layer's output.
/// w_o [hidden, H d] -> float64 [G, d, d].
at::Tensor output_gram(const at::Tensor& w_o, int64_t groups, int64_t head_dim);

}  // namespace drrl
