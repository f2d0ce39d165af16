#include "policy/allocation/cost_model.h"

namespace drrl {
namespace {

// Keys gathered one by one take as long as so many times their operations in a product: what
// `drrl-bench latency --gates` found on two CPU cores, forward and with backward passes. Counted at
// par, a budget would buy entries for little damage that cost more time than anything else.
constexpr double kGathered = 8;

}  // namespace

CostModel flops_cost_model(const BlockTree& tree, int64_t groups, int64_t heads_per_group,
                           int64_t head_dim, int64_t update_steps) {
  const int64_t heads = groups * heads_per_group;
  CostModel costs;
  costs.exact = exact_attention_flops(1, heads, tree.sequence_length(), head_dim,
                                      /*with_backward=*/false);
  costs.fixed = exact_part_flops(tree, 1, heads, groups, head_dim, /*with_backward=*/false)
                    .total() +
                output_gram_flops(heads * head_dim, heads, head_dim);
  costs.pair = [=](const PairRun& run, FarKind kind, int64_t rank) {
    const double form = kind == FarKind::kScores ? residual_factor_flops(head_dim, rank) : 0;
    const double basis = rank == head_dim
                             ? 0
                             : form + (update_steps >= 0
                                           ? basis_update_flops(head_dim, rank, update_steps)
                                           : basis_solve_flops(head_dim));
    return far_pair_flops(run, kind, rank, heads_per_group, head_dim, /*with_backward=*/false)
               .total() +
           basis;
  };
  costs.gated = [](const PairRun&) { return 0.0; };
  costs.exact_entries = [=](const PairRun& run) {
    return kGathered * static_cast<double>(heads_per_group * run.query_rows * run.key_rows) *
           exact_entry_flops(head_dim, /*with_backward=*/false);
  };
  return costs;
}

}  // namespace drrl
