#include "policy/allocation/candidates.h"

#include <algorithm>

#include "core/error.h"

namespace drrl {

RankCandidates::RankCandidates(const Calibration& calibration, const BlockTree& tree,
                               const std::vector<int64_t>& buckets, const CostModel& cost_model,
                               bool with_gates)
    : damage_(calibration.damage.contiguous()) {
  check(ErrorKind::kUsage, !with_gates || calibration.gates.defined(),
        "the calibration has no gates; make it again with this version");
  if (with_gates) {
    const auto all = calibration.gates.to(at::kFloat).contiguous();
    gates.assign(all.const_data_ptr<float>(), all.const_data_ptr<float>() + all.numel());
    gated_damage_ = calibration.gated_damage.contiguous();
    exact_entries_ = calibration.exact_entries.contiguous();
  }
  const int64_t d = calibration.head_dim();
  for (size_t i = 0; i < calibration.ranks.size(); ++i) {
    if (std::find(buckets.begin(), buckets.end(), calibration.ranks[i]) != buckets.end()) {
      ranks.push_back(calibration.ranks[i]);
      columns.push_back(static_cast<int64_t>(i));
    }
  }
  ranks.push_back(d);
  std::vector<double> queries(static_cast<size_t>(tree.num_levels()), 0.0);
  for (size_t r = 0; r < tree.runs().size(); ++r) {
    const PairRun& run = tree.runs()[r];
    queries[static_cast<size_t>(run.level)] += static_cast<double>(run.count * run.query_rows);
    gated_costs.push_back(with_gates ? cost_model.gated(run) : 0);
    exact_costs.push_back(with_gates ? cost_model.exact_entries(run) : 0);
    for (int64_t kind = 0; kind < 2; ++kind) {
      for (const int64_t rank : ranks) {
        costs.push_back(cost_model.pair(run, static_cast<FarKind>(kind), rank));
      }
    }
  }
  for (size_t r = 0; r < tree.runs().size(); ++r) {
    const PairRun& run = tree.runs()[r];
    run_of.insert(run_of.end(), static_cast<size_t>(run.count), static_cast<int64_t>(r));
    level_of.insert(level_of.end(), static_cast<size_t>(run.count), run.level);
    share_of.insert(share_of.end(), static_cast<size_t>(run.count),
                    static_cast<double>(run.query_rows) / queries[static_cast<size_t>(run.level)]);
  }
}

int64_t RankCandidates::calibrated_level(int64_t pair) const {
  return std::min(level_of[static_cast<size_t>(pair)], damage_.size(3) - 1);
}

double RankCandidates::gate_cost(int64_t layer, int64_t group, int64_t pair, size_t i, int64_t gate,
                                 double entries) const {
  const auto run = static_cast<size_t>(run_of[static_cast<size_t>(pair)]);
  const int64_t column = i < columns.size() ? columns[i] : exact_entries_.size(3) - 1;
  return gated_costs[run] +
         entries *
             exact_entries_
                 .accessor<double, 5>()[layer][group][calibrated_level(pair)][column][gate] *
             exact_costs[run];
}

double RankCandidates::damage(int64_t layer, int64_t group, int64_t kind, int64_t pair, size_t i,
                              int64_t gate) const {
  if (i == columns.size()) {
    return 0;
  }
  const int64_t level = calibrated_level(pair), column = columns[i];
  const double of_level = gate < 0
                              ? damage_.accessor<double, 5>()[layer][group][kind][level][column]
                              : gated_damage_
                                    .accessor<double, 6>()[layer][group][kind][level][column][gate];
  return of_level * share_of[static_cast<size_t>(pair)];
}

}  // namespace drrl
