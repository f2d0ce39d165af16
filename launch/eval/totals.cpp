#include "launch/eval/totals.h"

#include <cmath>
#include <iostream>

#include "launch/options/flags.h"

namespace drrl {

std::vector<double> merge(const std::vector<double>& mine, const Mesh& mesh) {
  auto all = at::tensor(mine, at::kDouble);
  mesh.dp().all_reduce(all);
  return {all.const_data_ptr<double>(), all.const_data_ptr<double>() + all.numel()};
}

Totals reduce(const Totals& mine, const Mesh& mesh) {
  auto losses = at::tensor({mine.nll, static_cast<double>(mine.tokens)}, at::kDouble);
  auto counts = at::tensor(mine.attention.counts(), at::kDouble);
  auto times = at::tensor({mine.attention.attention_ms, mine.attention.basis_ms}, at::kDouble);
  mesh.dp().all_reduce(losses);
  mesh.world().all_reduce(counts);
  mesh.tp().all_reduce(times, ReduceOp::kMax);
  mesh.cp().all_reduce(times, ReduceOp::kMax);
  mesh.dp().all_reduce(times);
  Totals all;
  all.nll = losses[0].item<double>();
  all.tokens = std::llround(losses[1].item<double>());
  all.attention.set_counts(
      {counts.const_data_ptr<double>(), counts.const_data_ptr<double>() + counts.numel()});
  all.attention.attention_ms = times[0].item<double>();
  all.attention.basis_ms = times[1].item<double>();
  if (!mine.sequence_nll.empty()) {
    all.sequence_nll = merge(mine.sequence_nll, mesh);
    for (size_t i = 0; i < all.sequence_nll.size(); ++i) {
      check_loss(static_cast<int64_t>(i), all.sequence_nll[i]);
    }
  }
  return all;
}

nlohmann::ordered_json attention_json(const AttentionStatistics& a, int64_t head_dim) {
  return {{"attention_flops_fraction", a.flops / a.exact_flops},
          {"attention_ms", a.attention_ms},
          {"decompositions", a.decompositions},
          {"basis_updates", a.updates},
          {"far_pairs", a.decisions},
          {"exact_pairs", a.exact_pairs},
          {"guard_raises",
           FLAGS_guard_eps > 0 ? nlohmann::ordered_json(a.guard_raises) : nlohmann::ordered_json()},
          {"basis_ms", a.basis_ms},
          {"context_bytes", a.context_bytes},
          {"context_exact_bytes", a.context_exact_bytes},
          {"basis_bytes", a.basis_bytes},
          {"mean_rank_qk", a.mean_rank_qk(head_dim)},
          {"mean_rank_v", a.mean_rank_v(head_dim)}};
}

void print_exact_pairs(const nlohmann::ordered_json& json) {
  if (const auto exact = json["exact_pairs"].get<int64_t>(); exact > 0) {
    std::cout << exact << " of " << json["far_pairs"]
              << " far pairs have exact scores or values, as no low rank serves them (rows that "
                 "are zero, beyond float32's range, or "
              << "of scores too large)\n";
  }
}

}  // namespace drrl
