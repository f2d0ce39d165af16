#pragma once

#include <vector>

#include <ATen/ATen.h>

#include "core/attention/flops.h"
#include "core/types/basis.h"
#include "core/types/block_tree.h"
#include "core/types/lowrank_plan.h"

namespace drrl {

/// Certificates of a plan's approximation: what its far pairs lose, exact or bounded from above,
/// from d x d Grams, a few sums over each pair's keys and values, and the queries; only row_scores,
/// what they are checked against, forms scores. Everything is float64 on the CPU. Items are the
/// plan's: B G pairs, pair innermost.

/// I - left right^T at each item's own rank of this kind, what a projection drops: [N, d, d]; zero
/// where the rank is d.
at::Tensor dropped(const LowRankPlan& plan, FarKind kind, int64_t head_dim);

/// Squared Frobenius norms of products X Y^T of unscaled rows, one entry an item.
struct FarLoss {
  at::Tensor loss;    ///< || X Y^T - X left right^T Y^T ||_F^2, [N]
  at::Tensor energy;  ///< || X Y^T ||_F^2, [N]
};

/// The exact loss of each item for the rows behind the Grams: tail_loss at its own rank, without
/// the cancellation against the energy. Scores: gram_x of the queries that are served, gram_y of
/// the keys. Gram of *other* queries, as pair_grams gives those of the left node, predict the loss
/// (times the ratio of rows) and bound nothing. Values as W_O sees them: gram_x of the values,
/// gram_y = output_gram.
FarLoss far_loss(const at::Tensor& dropped, const at::Tensor& gram_x, const at::Tensor& gram_y);

/// A far pair as the queries of one block see it.
struct SeenPair {
  int64_t pair, level;  ///< number among all pairs of the tree, and its level
  int64_t key_begin, key_rows;
};

/// The far pairs that the queries of block `block` see, nearest first; with the sinks and the block
/// itself they are all keys of its rows.
std::vector<SeenPair> seen_pairs(const BlockTree& tree, int64_t block);

/// What bounds need to know of each item; n keys k_j and values v_j, M and D what its bases drop
/// from scores and values.
struct FarErrors {
  at::Tensor scores;      ///< M, [N, d, d]
  at::Tensor residual;    ///< F of the correction || q F ||^2, [N, d, m]; zero where there is none
  at::Tensor keys;        ///< n, [N]
  at::Tensor key_gram;    ///< G_k, [N, d, d]
  at::Tensor key_sum;     ///< sum_j k_j, [N, d]
  at::Tensor lift;        ///< delta, a little of the mean diagonal of M G_k M^T, [N]
  at::Tensor leverage;    ///< max_j k_j^T M^T (M G_k M^T + delta I)^-1 M k_j, at most 1, [N]
  at::Tensor value_mean;  ///< v = mean_j v_j, [N, d]
  at::Tensor value_radius;    ///< max_j || v_j - v ||_2, [N]
  at::Tensor value_spread;    ///< || V - 1 v^T ||_2, [N]
  at::Tensor value_loss;      ///< || V D ||_2, [N]
  at::Tensor value_loss_row;  ///< max_j || D^T v_j ||_2, [N]
};

/// k, v [B, G, L, d] of any floating dtype; products, one Cholesky factorization and two symmetric
/// eigenproblems an item.
FarErrors far_errors(const LowRankPlan& plan, const at::Tensor& k, const at::Tensor& v);

/// m query rows of one block, sequence and KV group (heads are rows), and what their attention
/// knows after it served them.
struct ServedRows {
  at::Tensor queries;              ///< [m, d]
  at::Tensor out;                  ///< o', the rows that were returned, [m, d]
  at::Tensor mass, norm, largest;  ///< sum, 2-norm and maximum of the served weights w' over each
                                   ///< pair's keys that gates left at low rank, [P, m]
  at::Tensor spared;  ///< sum over the other keys of the pair of what low rank would have added to
                      ///< their scaled scores, squared, [P, m]
  double value_norm;  ///< at least || V ||_2 over all values that the rows see
  double value_radius;  ///< at least max_j || v_j ||_2 over them
};

struct RowBounds {
  at::Tensor scores;  ///< || e_P ||_2 of each pair over its keys at low rank, scaled scores with
                      ///< their correction: exact up to rounding, [P, m]
  at::Tensor eq9;     ///< bound on || o' - o ||_2 by the paper's Eq. 9, [m]
  at::Tensor output;  ///< the least of the bounds on || o' - o ||_2, [m]
};

/// Bounds on what lowrank_attention does to single rows of the output before W_O; the root of the
/// sum of their squares bounds the Frobenius norm.
///
/// A row has scores s_j, weights w = softmax(s) and output o = sum_j w_j v_j; served are s' = s +
/// e, w' = softmax(s') and o' = sum_j w'_j v_j - sum_P D_P^T sum(j in P) w'_j v_j. On the sinks
/// and the own block e = 0, and so it is on keys that gates made exact: P are the others of a pair
/// (what is bounded for all keys of the pair holds for them). On a pair, with x = M^T q / sqrt(d)
/// and c = || q F ||^2,
///   e_j = c - x . k_j,   || e_P ||^2 = x^T G_k x - 2 c x . sum_j k_j + n c^2 - spared,
///   | x . k_j | <= a := sqrt(leverage (x^T G_k x + delta || q ||^2 / d))
///   (Cauchy-Schwarz for q and M k_j in the metric of M G_k M^T + delta I).
/// 1. Before serving. J = diag(w) - w w^T has || J ||_2 <= 1/2 on the path from s to s', hence
///    || w' - w ||_2 <= || e ||_2 / 2; and of all e in an interval of length t none moves more than
///    2 tanh(t / 4) of weight (|| w' - w ||_1, attained by two tokens). So
///      || o' - o || <= min(|| e ||_2 || V ||_2 / 2,  2 tanh(t / 4) max_j || v_j ||)
///                      + max_P || V_P D_P ||_2,   t <= sqrt(2) || e ||_2.
///    The first is Eq. 9 of arXiv 2512.15973 with the right norm; summed over rows,
///    || dO ||_F <= || dS ||_F || V ||_2 / (2 sqrt(d)).
/// 2. After serving. Let f_j = exp(-e_j), Z = sum_j w'_j f_j. Since w_j = w'_j f_j / Z, exactly
///      o - o' = ( sum_P sum(j in P) w'_j (f_j - 1) (v_j - o')
///                 + sum_P D_P^T sum(j in P) w'_j v_j ) / Z.
///    With y = max(0, a - c), psi(y) = (e^y - 1 - y) / y^2:
///      | f_j - 1 | <= min(|e_j| (e^y - 1) / y,  |e_j| + psi(y) e_j^2,  max(1, e^y - 1)),
///    Cauchy-Schwarz over the pair's keys with || w'_P ||_2 or max w'_P,
///    v_j - o' = (v_j - mean) + (mean - o'), and by Jensen's inequality
///      Z >= 1 - sum_P w'(P) + sum_P w'(P) exp(-min(c + a, || w'_P ||_2 || e_P ||_2 / w'(P))).
/// 3. o is a mean of values: || o' - o || <= || o' || + max_j || v_j ||.
///
/// items [P]: those of the pairs that the rows see. Rigorous in exact arithmetic; rounding of a
/// float32 kernel comes on top.
RowBounds certify_rows(const FarErrors& far, const at::Tensor& items, const ServedRows& rows);

/// Scores of m query rows of one block against all keys up to its end, one by one: what
/// certificates are checked against. Scaled, [m, T]; -inf after each row's own token.
struct RowScores {
  at::Tensor exact, served;
  at::Tensor low;     ///< far keys at low rank: the served ones where no gate made them exact
  at::Tensor spared;  ///< where one did, bool
};

/// queries [m, d], the rows `rows` [m] of all [B, H, L], of block `block`; keys [at least T, d] of
/// their sequence and group, item `first_item` + p belonging to its pair p. made_exact: by gates,
/// in the pass that served the rows.
RowScores row_scores(const LowRankPlan& plan, const ExactEntries& made_exact,
                     const at::Tensor& queries, const at::Tensor& rows, const at::Tensor& keys,
                     int64_t block, int64_t first_item);

/// What `scores` of rows that see these pairs say of each, [P, m]; weights = softmax(scores.served)
/// [m, T].
struct ServedPairs {
  at::Tensor pairs;  ///< their numbers, [P]
  at::Tensor error;  ///< || e_P ||_2: what RowBounds::scores is checked against
  at::Tensor mass, norm, largest, spared;  ///< see ServedRows
};
ServedPairs served_pairs(const RowScores& scores, const at::Tensor& weights,
                         const std::vector<SeenPair>& pairs);

/// What replacing a stale subspace by the best one changes, one entry an item, NaN where the rank
/// is d. A = Q left right^T K^T holds the scores through the stale right factor of rank r and its
/// best left partner, A + E = Q K^T; sigma_i are singular values.
struct SubspaceChange {
  at::Tensor weyl;         ///< || E ||_2 / sigma_1(A + E), which bounds (Weyl)
  at::Tensor shift;        ///< the shift max_i | sigma_i(A + E) - sigma_i(A) | / sigma_1(A + E)
  at::Tensor davis_kahan;  ///< || E ||_2 / sigma_r(A + E), A having no singular value after r: it
                           ///< bounds (Davis-Kahan, Wedin)
  at::Tensor sine;  ///< the sine of the largest angle between the two right singular subspaces
                    ///< of dimension r
};

/// start [N, d, d]: right factors, of which an item uses the first r columns. Five decompositions
/// an item: for audits only.
SubspaceChange subspace_change(const at::Tensor& start, const std::vector<Ranks>& ranks,
                               const at::Tensor& gram_q, const at::Tensor& gram_k);

}  // namespace drrl
