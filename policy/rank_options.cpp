#include "policy/rank_options.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace drrl {

std::vector<RankItem> rank_items(const Calibration& calibration, const BlockTree& tree, const std::vector<int64_t>& buckets, const Prices& prices, bool with_gates) {
  check(ErrorKind::kUsage, !with_gates || calibration.gates.defined(), "the calibration has no gates; make it again with this version");
  const Choices all(calibration, tree, buckets, prices);
  const std::vector<int64_t>& ranks = all.ranks;
  const size_t choices = ranks.size();
  const int64_t levels = tree.num_levels();

  // Costs by level, kind and choice, of one layer and group; of gates on a level; and of all its entries, exact.
  std::vector<double> costs(static_cast<size_t>(levels) * 2 * choices, 0.0), gated_costs(static_cast<size_t>(levels), 0.0), exact_costs = gated_costs;
  for (const PairRun& run : tree.runs()) {
    gated_costs[static_cast<size_t>(run.level)] += with_gates ? prices.gated(run) * static_cast<double>(run.count) : 0;
    exact_costs[static_cast<size_t>(run.level)] += prices.exact_entries(run) * static_cast<double>(run.count);
    for (size_t kind = 0; kind < 2; ++kind) {
      for (size_t c = 0; c < choices; ++c) {
        costs[(static_cast<size_t>(run.level) * 2 + kind) * choices + c] +=
            all.cost(run.first_pair, static_cast<int64_t>(kind), c) * static_cast<double>(run.count);
      }
    }
  }

  std::vector<RankItem> items;
  const auto table_of = calibration.damage.accessor<double, 5>();
  const at::Tensor gated_damage = with_gates ? calibration.gated_damage.contiguous() : at::zeros({0, 0, 0, 0, 0, 0}, at::kDouble);
  const at::Tensor exact_entries = with_gates ? calibration.exact_entries.contiguous() : at::zeros({0, 0, 0, 0, 0}, at::kDouble);
  const auto gated_of = gated_damage.accessor<double, 6>();
  const auto exact_of = exact_entries.accessor<double, 5>();
  std::vector<float> gates;
  for (int64_t gate = 0; with_gates && gate < calibration.gates.size(0); ++gate) {
    gates.push_back(calibration.gates[gate].to(at::kFloat).item<float>());
  }
  const auto column = [&](size_t c) { return c + 1 < choices ? all.columns[c] : static_cast<int64_t>(calibration.ranks.size()); };
  for (int64_t layer = 0; layer < calibration.layers(); ++layer) {
    for (int64_t group = 0; group < calibration.groups(); ++group) {
      for (int64_t level = 0; level < levels; ++level) {
        const int64_t measured = std::min(level, calibration.levels() - 1);
        const auto damage = [&](int64_t kind, size_t c) { return c + 1 < choices ? table_of[layer][group][kind][measured][all.columns[c]] : 0; };
        const auto takes = [&](size_t kind, size_t c) { return costs[(static_cast<size_t>(level) * 2 + kind) * choices + c]; };
        RankItem& item = items.emplace_back();
        for (size_t qk = 0; qk < choices; ++qk) {
          for (size_t v = 0; v < choices; ++v) {
            const double low = takes(0, qk) + takes(1, v);
            for (size_t g = 0; g < gates.size() && (qk + 1 < choices || v + 1 < choices); ++g) {
              const auto gate = static_cast<int64_t>(g);
              const auto spoiled = [&](int64_t kind, size_t c) { return c + 1 < choices ? gated_of[layer][group][kind][measured][all.columns[c]][gate] : 0; };
              const double gate_costs = gated_costs[static_cast<size_t>(level)] +
                                  exact_of[layer][group][measured][column(qk)][gate] * exact_costs[static_cast<size_t>(level)];
              item.options.push_back({spoiled(0, qk) + spoiled(1, v), low + gate_costs, {ranks[qk], ranks[v], gates[g]}});
            }
            item.options.push_back({damage(0, qk) + damage(1, v), low, {ranks[qk], ranks[v]}});
          }
        }
      }
    }
  }
  return items;
}

double spend_left(std::span<RankItem> items, double left) {
  for (;;) {
    double best = 0;
    RankItem* at = nullptr;
    size_t to = 0;
    for (RankItem& item : items) {
      for (size_t c = 0; c < item.options.size(); ++c) {
        const double gain = item.now().damage - item.options[c].damage;
        const double cost = item.options[c].cost - item.now().cost;
        if (gain > 0 && cost <= left && gain / std::max(cost, 1.0) > best) {
          best = gain / std::max(cost, 1.0);
          at = &item;
          to = c;
        }
      }
    }
    if (at == nullptr) {
      return left;
    }
    left -= at->options[to].cost - at->now().cost;
    at->chosen = to;
  }
}

RankTable chosen_ranks(const std::vector<RankItem>& items, int64_t layers, int64_t groups) {
  const int64_t levels = static_cast<int64_t>(items.size()) / (layers * groups);
  RankTable table(layers, groups, levels, {});
  size_t next = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t level = 0; level < levels; ++level) {
        table.at(layer, group, level) = items[next++].now().ranks;
      }
    }
  }
  return table;
}

}  // namespace drrl
