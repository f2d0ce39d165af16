#pragma once

#include <vector>

#include <ATen/ATen.h>

#include "core/linalg/basis.h"
#include "core/linalg/gram.h"
#include "core/types/block_tree.h"
#include "core/types/lowrank_plan.h"

namespace drrl {

/// Bases of far pairs of one layer, [B G pairs, d, columns] each, pair innermost, and what it took
/// to make them. Made from the Grams of each pair's left node alone, that is from the very keys
/// that they compress, they are strictly causal.
struct FarBases {
  Basis scores;
  Basis values;
  at::Tensor residual;  ///< residual_factors of the scores, once complete_bases has made them
  int64_t decompositions = 0;  ///< full ones
  int64_t updates = 0;         ///< rounds of update_basis, summed over pairs
  int64_t exact_pairs = 0;     ///< items that complete_bases made exact
  double flops = 0;            ///< of decompositions, updates, residual factors and the output Gram
};

/// How the bases of far pairs are made.
struct BasisOptions {
  /// Rounds of `update_basis` from the starting bases; kSolve: a full decomposition for each pair
  /// instead.
  int64_t update_steps = 2;
  /// Starting bases, [layers, G, 2, d, d] of this process's KV groups (Calibration::bases);
  /// undefined: from each sequence's first block, or solved in full if that has fewer tokens than
  /// d.
  at::Tensor start;

  static constexpr int64_t kSolve = -1;
};

/// The Grams that bases are made from: pair_grams with keys and values weighted by attention_mass,
/// or not.
PairGrams far_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const BlockTree& tree, bool weighted = true);

/// The output Gram that belongs to these Grams, [G, d, d]: theirs, or that of w_o.
at::Tensor output_of(const PairGrams& grams, const at::Tensor& w_o);

/// The best bases of every pair at all ranks at once (d columns), one full decomposition each; only
/// of what is asked for. grams [B, G, pairs, d, d]; w_o [hidden, H d].
FarBases solve_far_bases(const PairGrams& grams, const at::Tensor& w_o, bool scores, bool values);

/// Bases of the given ranks (one entry a pair; rank d makes none; columns beyond a pair's rank are
/// not defined), by `steps` rounds of `update_basis` each. All pairs of a KV group start from its
/// `start` [B G, 2, d, d]: right factors of scores and values.
FarBases update_far_bases(const PairGrams& grams, const at::Tensor& w_o,
                          const std::vector<Ranks>& ranks, const at::Tensor& start, int64_t steps);

/// Where updates start without a calibration: right factors [B G, 2, d, d] of full decompositions
/// for the first pair, which is older than all others' queries; one for each (sequence, KV group)
/// and kind.
at::Tensor first_pair_bases(const PairGrams& grams, const at::Tensor& w_o);

/// The problems that they solve, X^T X and Y^T Y: [2, 2 B G, d, d], numbered (sequence, KV group,
/// kind).
at::Tensor first_pair_problems(const PairGrams& grams, const at::Tensor& w_o);

/// What a layer has for each KV group, such as starting bases [G, 2, d, d], for every sequence of a
/// batch: [B G, ..].
at::Tensor for_batch(const at::Tensor& of_layer, int64_t batch);

/// How many keys each pair has, in the order of the tree's pairs.
std::vector<int64_t> key_counts(const BlockTree& tree);

/// residual_factor of each pair's score basis at its rank: [B G pairs, d, m] float32, of pairs with
/// `keys[pair]` keys. Undefined if every rank is d; not defined for items whose rank is d.
at::Tensor residual_factors(const PairGrams& grams, const Basis& scores,
                            const std::vector<Ranks>& ranks, const std::vector<int64_t>& keys);

/// What bases can be made of, for each item (B G pairs): Grams of traces from 1e-30 to 1e30, within
/// which float32 sums of squares mean something.
struct UsablePairs {
  std::vector<bool> scores, values;
};

/// Tells them, and puts the identity in the place of other Grams, so that all that follows is
/// finite. Scores need the Grams of queries and keys, values those of values and of the output,
/// which grams.output holds from now on. On CUDA, where it would have to wait for the device, all
/// count as usable.
UsablePairs usable_pairs(PairGrams& grams, const at::Tensor& w_o);

/// Items that no low rank serves become exact: scores or values that are not usable, and scores
/// whose error would make another softmax of it. The latter is foretold by the keys' older queries:
/// their mean correction by the residual factor is above kHopelessCorrection (entries would be off
/// by a factor of exp(2.8), root mean square), or their scores, root mean square, are above
/// kHopelessScore, where what float32 bases round is too much. heads_per_group: of all query heads
/// that grams.queries sums. keys: of each pair. Returns how many items changed; on CUDA, likewise,
/// none.
int64_t leave_exact(const PairGrams& grams, const UsablePairs& usable, int64_t heads_per_group,
                    const std::vector<int64_t>& keys, const at::Tensor& residual,
                    std::vector<Ranks>& ranks);
inline constexpr double kHopelessCorrection = 4, kHopelessScore = 1e5;

/// Finishes bases just made for these ranks (B G pairs): makes their residual factors, counts the
/// operations of that, then calls leave_exact, which may change `ranks`, and notes how many items
/// did change. Other arguments as there.
void complete_bases(FarBases& bases, const PairGrams& grams, const UsablePairs& usable,
                    int64_t heads_per_group, const std::vector<int64_t>& keys,
                    std::vector<Ranks>& ranks);

/// A plan of these bases at these ranks, with the residual factors of its scores, which are made
/// here. Leaves nothing exact that the ranks do not.
c10::intrusive_ptr<LowRankPlan> make_plan(const BlockTree& tree, std::vector<Ranks> ranks,
                                          const PairGrams& grams, const FarBases& bases);

}  // namespace drrl
