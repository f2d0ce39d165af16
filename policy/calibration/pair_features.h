#pragma once

#include <vector>

#include <ATen/ATen.h>

#include "core/linalg/gram.h"
#include "core/types/block_tree.h"

namespace drrl {

/// What the bases that updates start from would lose on each pair's Grams at every rank
/// (stale_loss): [B G count, d + 1] float64 on the CPU, column 0 the whole energy. Of values as W_O
/// sees them this is exact; of scores it is about the older queries that the Grams hold, and
/// foretells newer ones.
struct StartLoss {
  at::Tensor scores;
  at::Tensor values;
};

/// grams [B, G, count, d, d]; w_o [hidden, H d]; start [B G, 2, d, d] right factors.
StartLoss start_loss(const PairGrams& grams, const at::Tensor& w_o, const at::Tensor& start);

/// Features of a far pair for `ranks` choices below d: for scores and values each the logarithm of
/// the share of the energy that every rank loses, and of the energy itself; then level and
/// position.
inline int64_t pair_features(const std::vector<int64_t>& ranks) {
  return 2 * (static_cast<int64_t>(ranks.size()) + 1) + 2;
}

/// What a learned policy sees of each far pair: its "spectra and stale loss" (arXiv 2512.15973,
/// state s_t). Nothing but the Grams of the pair's left node and the bases that updates start from
/// enters, that is the past of all of the pair's queries; no decomposition is made.
///
///   log(stale_loss(r) / total)  for scores and values at each of `ranks`, clamped below at e^-12
///   log of the mean squared score, total / (queries keys d), and of the mean squared value as W_O
///     sees it
///   level / 8, log2(1 + index of the pair's first query block) / 8
///
/// grams of `count` pairs of `tree` from number `first_pair` on, [B, G, count, d, d], sums over
/// heads_per_group query heads; start [B G, 2, d, d] right factors. Returns [B, G, count,
/// pair_features(ranks)] float32 on the CPU.
at::Tensor pair_state(const PairGrams& grams, const at::Tensor& w_o, int64_t heads_per_group,
                      const at::Tensor& start, const BlockTree& tree, int64_t first_pair,
                      const std::vector<int64_t>& ranks);

/// Operations of start_loss for one pair, and with it of pair_state: stale_loss of both kinds.
double start_loss_flops(int64_t d);

}  // namespace drrl
