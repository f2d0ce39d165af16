#include "core/attention/flops.h"

#include <algorithm>

#include "core/attention/tiles.h"
#include "core/linalg/basis.h"

namespace drrl {
namespace {
constexpr double kForwardAndBackward = 3.5;  // 2 products forward, 5 backward
double triangle(double n) {
  return n * (n + 1) / 2;
}
}  // namespace

AttentionFlops& AttentionFlops::operator+=(const AttentionFlops& other) {
  near += other.near;
  sinks += other.sinks;
  far += other.far;
  projections += other.projections;
  grams += other.grams;
  bases += other.bases;
  return *this;
}

double exact_attention_flops(int64_t batch, int64_t heads, int64_t length, int64_t head_dim,
                             bool with_backward) {
  return 4.0 * batch * heads * head_dim * triangle(static_cast<double>(length)) *
         (with_backward ? kForwardAndBackward : 1.0);
}

double basis_solve_flops(int64_t d) {
  const double cube = static_cast<double>(d) * d * d;
  return cube * (1.0 / 3 + 5 * 2 + 9);
}

double basis_update_flops(int64_t d, int64_t rank, int64_t steps) {
  const double n = static_cast<double>(d), r = static_cast<double>(rank);
  return (2.0 * static_cast<double>(steps) + 1) * (2 * n * n * r + 4 * n * r * r + r * r * r / 3);
}

double stale_loss_flops(int64_t d) {
  const double cube = static_cast<double>(d) * d * d;
  return cube * (3 * 2 + 1.0 / 3 + 1);
}

double output_gram_flops(int64_t hidden, int64_t heads, int64_t d) {
  return 2.0 * static_cast<double>(hidden * heads * d * d);
}

double residual_factor_flops(int64_t d, int64_t rank) {
  const double n = static_cast<double>(d), r = static_cast<double>(rank),
               m = static_cast<double>(std::min(kResidualColumns, d));
  return 2 * (8 * n * r * m + 2 * n * n * m) + 3 * n * m * m + m * m * m / 3;
}

AttentionFlops far_pair_flops(const PairRun& run, FarKind kind, int64_t rank,
                              int64_t heads_per_group, int64_t head_dim, bool with_backward,
                              double kept) {
  const double r = static_cast<double>(rank);
  const double queries = static_cast<double>(heads_per_group * run.query_rows);
  const double keys = static_cast<double>(run.key_rows);
  AttentionFlops flops;
  const double backward_products = with_backward ? kForwardAndBackward - 1 : 0;
  flops.far = 2 * r * queries * keys *
              ((kind == FarKind::kScores ? 1 : kept) + kept * backward_products);
  if (rank < head_dim) {
    // Forward: queries and keys down, or values down and the output up. Backward: the inputs down
    // again and their gradients up.
    const double forward = queries + keys;
    const double backward = kind == FarKind::kScores ? 2 * (queries + keys) : queries + 2 * keys;
    const double d = static_cast<double>(head_dim);
    flops.projections = 2 * d * r * (forward + (with_backward ? backward : 0));
    if (kind == FarKind::kScores) {  // || q F ||^2, in both directions
      const double columns = static_cast<double>(std::min(kResidualColumns, head_dim));
      flops.projections += 2 * (d + 1) * columns * queries * (with_backward ? 2 : 1);
    }
  }
  return flops;
}

double exact_entry_flops(int64_t head_dim, bool with_backward) {
  return 4 * static_cast<double>(head_dim) * (with_backward ? kForwardAndBackward : 1.0);
}

AttentionFlops exact_part_flops(const BlockTree& tree, int64_t batch, int64_t heads, int64_t groups,
                                int64_t head_dim, bool with_backward) {
  const double d = static_cast<double>(head_dim);
  const double all_heads = static_cast<double>(batch * heads);
  const double passes = with_backward ? kForwardAndBackward : 1.0;
  const double block = static_cast<double>(tree.geometry().near_block);
  const double sinks = static_cast<double>(tree.sinks());
  const double complete = std::max<double>(0, static_cast<double>(tree.num_blocks()) - 1);
  AttentionFlops flops;
  flops.near = 4 * d * all_heads * passes *
               (complete * triangle(block) + triangle(static_cast<double>(tree.last_block_rows())));
  flops.sinks = 4 * d * all_heads * passes *
                (triangle(sinks) +
                 sinks * static_cast<double>(tree.sequence_length() - tree.sinks()));
  flops.grams = 2 * d * block * complete *
                (d * (all_heads + 2.0 * static_cast<double>(batch * groups)) +
                 all_heads);  // and attention_mass
  return flops;
}

AttentionFlops lowrank_attention_flops(const LowRankPlan& plan, int64_t batch, int64_t heads,
                                       int64_t groups, int64_t head_dim, double basis_flops,
                                       bool with_backward, const FarServed& served) {
  const BlockTree& tree = plan.tree;
  AttentionFlops flops;
  const bool exact = std::all_of(plan.ranks.begin(), plan.ranks.end(), [&](const Ranks& r) {
    return r.qk == head_dim && r.v == head_dim && !r.drops();
  });
  if (exact) {  // executed as exact attention
    flops.near = exact_attention_flops(batch, heads, tree.sequence_length(), head_dim,
                                       with_backward);
    return flops;
  }
  flops = exact_part_flops(tree, batch, heads, groups, head_dim, with_backward);
  const std::vector<double> shares = kept_shares(served.kept_from, tree, groups);
  for (int64_t sequence = 0; sequence < batch * groups; ++sequence) {
    for (const PairRun& run : tree.runs()) {
      for (int64_t i = 0; i < run.count; ++i) {
        const int64_t item = sequence * tree.num_pairs() + run.first_pair + i;
        const Ranks& ranks = plan.ranks[static_cast<size_t>(item)];
        const double kept = shares.empty() ? 1 : shares[static_cast<size_t>(item)];
        for (const FarKind kind : {FarKind::kScores, FarKind::kValues}) {
          flops += far_pair_flops(run, kind, kind == FarKind::kScores ? ranks.qk : ranks.v,
                                  heads / groups, head_dim, with_backward, kept);
        }
      }
    }
  }
  flops.far += exact_entry_flops(head_dim, with_backward) *
               static_cast<double>(served.exact.size());  // beside what they took at low rank
  flops.bases = basis_flops;
  return flops;
}

}  // namespace drrl
