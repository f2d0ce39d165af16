#include "policy/rank_options.h"

#include <algorithm>

namespace drrl {

std::vector<RankItem> rank_items(const Calibration& calibration, const BlockTree& tree, const std::vector<int64_t>& buckets, const Prices& prices, bool with_gates) {
  const Choices all(calibration, tree, buckets, prices, with_gates);
  const size_t choices = all.ranks.size();
  const auto gates = static_cast<int64_t>(all.gates.size());
  std::vector<RankItem> items;
  for (int64_t layer = 0; layer < calibration.layers(); ++layer) {
    for (int64_t group = 0; group < calibration.groups(); ++group) {
      for (int64_t level = 0; level < tree.num_levels(); ++level) {
        const auto sum_over_pairs = [&](const auto& of_pair) {  // those of a run are alike
          double sum = 0;
          for (const PairRun& run : tree.runs()) {
            sum += run.level == level ? of_pair(run.first_pair) * static_cast<double>(run.count) : 0;
          }
          return sum;
        };
        const auto costs = [&](int64_t kind, size_t i) { return sum_over_pairs([&](int64_t pair) { return all.cost(pair, kind, i); }); };
        const auto gate_costs = [&](size_t i, int64_t gate) { return sum_over_pairs([&](int64_t pair) { return all.gate_cost(layer, group, pair, i, gate); }); };
        const auto damage = [&](int64_t kind, size_t i, int64_t gate) {
          return sum_over_pairs([&](int64_t pair) { return all.damage(layer, group, kind, pair, i, gate); });
        };
        RankItem& item = items.emplace_back();
        for (size_t qk = 0; qk < choices; ++qk) {
          for (size_t v = 0; v < choices; ++v) {
            const double low = costs(0, qk) + costs(1, v);
            const int64_t some = qk + 1 < choices || v + 1 < choices ? gates : 0;  // what is exact needs no gate
            for (int64_t gate = 0; gate < some; ++gate) {
              item.options.push_back({damage(0, qk, gate) + damage(1, v, gate), low + gate_costs(qk, gate), {all.ranks[qk], all.ranks[v], all.gates[static_cast<size_t>(gate)]}});
            }
            item.options.push_back({damage(0, qk, -1) + damage(1, v, -1), low, {all.ranks[qk], all.ranks[v]}});
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
