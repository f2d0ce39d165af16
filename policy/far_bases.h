#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "core/basis.h"
#include "core/block_tree.h"
#include "core/lowrank_attention.h"

namespace drrl {

/// Bases of all far pairs of one layer, [B G pairs, d, columns] each, pair innermost, strictly causal: made from the Grams of each pair's left node, that
/// is from the very keys that they compress. And what it took to make them.
struct FarBases {
  Basis scores;
  Basis values;
  at::Tensor key_grams;  ///< G_k of each pair, [B G pairs, d, d] float64
  int64_t solves = 0;   ///< full decompositions
  int64_t updates = 0;  ///< rounds of update_basis, summed over pairs
  double flops = 0;     ///< of solves, updates and the output Gram
};

/// The best bases of every pair at all ranks at once (d columns): one full decomposition each. Only for what is asked for. Shapes as in
/// lowrank_attention.
FarBases solve_far_bases(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o, const BlockTree& tree,
                         bool scores, bool values);

/// Bases of the given ranks (one entry a pair; rank d makes none; columns beyond a pair's rank are not defined), by `steps` rounds of `update_basis`
/// each. All start from `start` [G, 2, d, d] (Calibration::bases of the layer), or where that is undefined from a full decomposition for the sequence's
/// first block, one for each KV group and kind.
FarBases update_far_bases(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o, const BlockTree& tree,
                          const std::vector<Ranks>& ranks, const at::Tensor& start, int64_t steps);

/// A plan of these bases at these ranks, with the residual forms of its scores. Adds the operations of the latter to bases.flops.
c10::intrusive_ptr<LowRankPlan> make_plan(const BlockTree& tree, std::vector<Ranks> ranks, FarBases& bases);

}  // namespace drrl
