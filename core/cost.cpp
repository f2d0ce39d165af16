#include "core/cost.h"

#include <algorithm>

namespace drrl {
namespace {
constexpr double kForwardAndBackward = 3.5;  // 2 products forward, 5 backward
double triangle(double n) { return n * (n + 1) / 2; }
}  // namespace

AttentionFlops& AttentionFlops::operator+=(const AttentionFlops& other) {
  near += other.near;
  sinks += other.sinks;
  far += other.far;
  projections += other.projections;
  grams += other.grams;
  tests += other.tests;
  solves += other.solves;
  return *this;
}

double exact_attention_flops(int64_t batch, int64_t heads, int64_t length, int64_t head_dim, bool with_backward) {
  return 4.0 * batch * heads * head_dim * triangle(static_cast<double>(length)) * (with_backward ? kForwardAndBackward : 1.0);
}

double basis_solve_flops(int64_t d) {
  const double cube = static_cast<double>(d) * d * d;
  return cube * (1.0 / 3 + 5 * 2 + 9);
}

AttentionFlops lowrank_attention_flops(const LowRankPlan& plan, int64_t batch, int64_t heads, int64_t groups, int64_t head_dim,
                                       int64_t solves, bool with_backward) {
  const BlockTree& tree = plan.tree;
  const double d = static_cast<double>(head_dim);
  const double all_heads = static_cast<double>(batch) * heads;
  const double passes = with_backward ? kForwardAndBackward : 1.0;
  const double block = static_cast<double>(tree.geometry().near_block);
  const double sinks = static_cast<double>(tree.sinks());

  AttentionFlops flops;
  const bool exact = std::all_of(plan.ranks.begin(), plan.ranks.end(),
                                 [&](const Ranks& r) { return r.qk == head_dim && r.v == head_dim; });
  if (exact) {  // executed as exact attention
    flops.near = exact_attention_flops(batch, heads, tree.sequence_length(), head_dim, with_backward);
    return flops;
  }
  flops.near = 4 * d * all_heads * passes *
               (std::max<double>(0, static_cast<double>(tree.num_blocks()) - 1) * triangle(block) +
                triangle(static_cast<double>(tree.last_block_rows())));
  flops.sinks = 4 * d * all_heads * passes * (triangle(sinks) + sinks * static_cast<double>(tree.sequence_length() - tree.sinks()));

  const double heads_per_group = static_cast<double>(heads) / groups;
  const int64_t pairs = tree.num_pairs();
  for (int64_t sequence = 0; sequence < batch * groups; ++sequence) {
    for (const PairRun& run : tree.runs()) {
      for (int64_t i = 0; i < run.count; ++i) {
        const Ranks& ranks = plan.ranks[sequence * pairs + run.first_pair + i];
        const double qk = static_cast<double>(ranks.qk), value = static_cast<double>(ranks.v);
        const double queries = heads_per_group * run.query_rows;
        const double keys = static_cast<double>(run.key_rows);
        flops.far += 2 * (qk + value) * queries * keys * passes;
        // Forward: q, k, v down and the output up. Backward: those three and the gradient down again, three gradients up.
        if (ranks.qk < head_dim) {
          flops.projections += 2 * d * qk * (queries + keys) * (with_backward ? 3 : 1);
        }
        if (ranks.v < head_dim) {
          flops.projections += 2 * d * value * ((queries + keys) + (with_backward ? queries + 2 * keys : 0));
        }
      }
    }
  }
  flops.grams = 2 * d * d * block * std::max<double>(0, static_cast<double>(tree.num_blocks()) - 1) *
                (all_heads + 2.0 * batch * groups);
  flops.solves = static_cast<double>(solves) * basis_solve_flops(head_dim);
  return flops;
}

}  // namespace drrl
