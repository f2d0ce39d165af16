#include "policy/allocation/knapsack.h"

#include <algorithm>

#include "policy/allocation/candidates.h"

namespace drrl {

std::vector<KnapsackItem> knapsack_items(const Calibration& calibration, const BlockTree& tree,
                                         const std::vector<int64_t>& buckets,
                                         const CostModel& cost_model, bool with_gates) {
  const RankCandidates all(calibration, tree, buckets, cost_model, with_gates);
  const size_t choices = all.ranks.size();
  const auto gates = static_cast<int64_t>(all.gates.size());
  std::vector<KnapsackItem> items;
  for (int64_t layer = 0; layer < calibration.layers(); ++layer) {
    for (int64_t group = 0; group < calibration.groups(); ++group) {
      for (int64_t level = 0; level < tree.num_levels(); ++level) {
        // Sums over the level's pairs, those of a run being alike: [choice][1 + gate], without a
        // gate first.
        const auto sums = [&](const auto& of_pair) {
          std::vector<std::vector<double>> table(
              choices, std::vector<double>(static_cast<size_t>(1 + gates)));
          for (size_t i = 0; i < choices; ++i) {
            for (int64_t gate = -1; gate < gates; ++gate) {
              for (const PairRun& run : tree.runs()) {
                table[i][static_cast<size_t>(1 + gate)] += run.level == level
                                                               ? of_pair(run.first_pair, i, gate) *
                                                                     static_cast<double>(run.count)
                                                               : 0;
              }
            }
          }
          return table;
        };
        const auto costs = [&](int64_t kind) {  // gates are on the account of scores
          return sums([&](int64_t pair, size_t i, int64_t gate) {
            return all.cost(pair, kind, i) +
                   (kind == 0 && gate >= 0 ? all.gate_cost(layer, group, pair, i, gate) : 0);
          });
        };
        const auto damages = [&](int64_t kind) {
          return sums([&](int64_t pair, size_t i, int64_t gate) {
            return all.damage(layer, group, kind, pair, i, gate);
          });
        };
        const auto score_costs = costs(0), value_costs = costs(1), score_damages = damages(0),
                   value_damages = damages(1);
        KnapsackItem& item = items.emplace_back();
        for (size_t qk = 0; qk < choices; ++qk) {
          for (size_t v = 0; v < choices; ++v) {
            const int64_t some = qk + 1 < choices || v + 1 < choices
                                     ? gates
                                     : 0;  // what is exact needs no gate
            for (int64_t gate = -1; gate < some; ++gate) {
              const auto g = static_cast<size_t>(1 + gate);
              Ranks ranks{all.ranks[qk], all.ranks[v]};
              ranks.gate = gate < 0 ? ranks.gate : all.gates[static_cast<size_t>(gate)];
              item.candidates.push_back({score_damages[qk][g] + value_damages[v][g],
                                         score_costs[qk][g] + value_costs[v][g], ranks});
            }
          }
        }
      }
    }
  }
  return items;
}

double assign_leftover(std::span<KnapsackItem> items, double left) {
  for (;;) {
    double best = 0;
    KnapsackItem* at = nullptr;
    size_t to = 0;
    for (KnapsackItem& item : items) {
      for (size_t c = 0; c < item.candidates.size(); ++c) {
        const double gain = item.now().damage - item.candidates[c].damage;
        const double cost = item.candidates[c].cost - item.now().cost;
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
    left -= at->candidates[to].cost - at->now().cost;
    at->chosen = to;
  }
}

RankTable chosen_ranks(const std::vector<KnapsackItem>& items, int64_t layers, int64_t groups) {
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
