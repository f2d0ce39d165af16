#pragma once

#include <ATen/ATen.h>

#include "core/types/block_tree.h"

namespace drrl {

/// Gram matrices of the key side of every far pair: what its bases are made from, and all that they
/// may be made from. Queries, keys and values of the *left* node only, so that nothing a query sees
/// depends on a token after it. Sinks are left out.
struct PairGrams {
  at::Tensor queries;      ///< G_q = sum over the group's heads of Q^T Q, [B, G, pairs, d, d]
  at::Tensor keys;         ///< G_k = K^T K, or K^T diag(w) K, [B, G, pairs, d, d]
  at::Tensor values;       ///< G_v = V^T V, or V^T diag(w) V, [B, G, pairs, d, d]
  at::Tensor output = {};  ///< output_gram, [G, d, d], of heads of which this process holds some
                           ///< only; undefined: W_O here is of all
};

/// Symmetric matrices [.., d, d] as their lower triangles, row by row [.., d (d + 1) / 2], and
/// back: what travels of a Gram.
at::Tensor lower_triangle(const at::Tensor& symmetric);
at::Tensor from_lower_triangle(const at::Tensor& lower, int64_t d);
/// Dtype of Grams in messages: float64 if the inputs are float64, else float32, which is as precise
/// as the products that make a Gram.
at::ScalarType travelling_type(at::ScalarType of_inputs);

/// How much attention keys get, estimated from queries that see them: w_j = rows ((1 - m) mean_h
/// softmax_j(q_h . k_j / sqrt(d)) + m / rows), over the rows of one block, for the mean query q_h
/// of each head of the group; a share m = 0.1 is spread evenly. The w of a block sum to its rows.
/// An error of a key or value counts as much as the attention that rests on it, and attention rests
/// on few tokens.
///
/// mean_queries [.., g, d], keys [.., rows, d] -> [.., rows], at least float32.
at::Tensor attention_mass(const at::Tensor& mean_queries, const at::Tensor& keys);

/// The same for every block that is on the left of a pair: q [B, H, L, d], k [B, G, L, d] -> [B, G,
/// blocks - 1, near_block].
at::Tensor attention_mass(const at::Tensor& q, const at::Tensor& k, const BlockTree& tree);

/// Computes the Grams of all far pairs of one layer: one product per block, then sums up the tree.
///
/// q [B, H, L, d], k and v [B, G, L, d] with G dividing H; any floating dtype, any device.
/// key_weights [B, G, blocks - 1, near_block], as attention_mass gives them, weigh keys and values;
/// undefined: all alike. returns float32 accumulated by matrix products of at least float32, then
/// summed in float64: float64 tensors. Errors: c10::Error if a shape disagrees with the tree or
/// with another.
PairGrams pair_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const BlockTree& tree, const at::Tensor& key_weights = {});

/// What pair_grams sums up, with the weights of attention_mass: the Grams of each of `blocks`
/// blocks of `rows` tokens from token `begin` on, [B, G, blocks, d, d] float64. For sequences of
/// which a process holds some blocks only.
PairGrams block_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t begin,
                      int64_t blocks, int64_t rows);

/// The lower triangles of the same, in travelling_type: [3, B, G, blocks, d (d + 1) / 2], of
/// queries, keys and values.
at::Tensor block_gram_triangles(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                int64_t begin, int64_t blocks, int64_t rows);

/// X^T X, or X^T diag(w) X, of all rows of x, summed over the heads of each of `groups` groups: one
/// product for each run of `rows` tokens, which L is a multiple of, summed in float64, as
/// pair_grams does. x [B, H, L, d], weights [B, groups, L / rows, rows] (with one head a group) or
/// undefined
/// -> float64 [B, groups, d, d].
at::Tensor token_gram(const at::Tensor& x, int64_t groups, int64_t rows,
                      const at::Tensor& weights = {});

/// G_o = sum over the heads of each KV group of W_O^T W_O: how much a direction of the attention
/// output weighs in the layer's output. w_o [hidden, H d] -> float64 [G, d, d].
at::Tensor output_gram(const at::Tensor& w_o, int64_t groups, int64_t head_dim);

}  // namespace drrl
