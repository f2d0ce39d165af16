#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "core/error.h"
#include "policy/calibration.h"
#include "policy/latency.h"
#include "policy/prices.h"

namespace drrl {
namespace {

// What can be chosen for the pairs of one layer, KV group and level, what it takes and what it spoils.
struct Option {
  double damage, cost;
  Ranks ranks;
};

struct Item {
  std::vector<Option> options;  // the last one, exact, does no damage
  size_t chosen = 0;

  const Option& now() const { return options[chosen]; }
};

}  // namespace

Choices::Choices(const Calibration& calibration, const BlockTree& tree, const std::vector<int64_t>& buckets, const Prices& prices) {
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
    for (int64_t kind = 0; kind < 2; ++kind) {
      for (const int64_t rank : ranks) {
        costs.push_back(prices.pair(run, static_cast<FarKind>(kind), rank));
      }
    }
  }
  for (size_t r = 0; r < tree.runs().size(); ++r) {
    const PairRun& run = tree.runs()[r];
    run_of.insert(run_of.end(), static_cast<size_t>(run.count), static_cast<int64_t>(r));
    level_of.insert(level_of.end(), static_cast<size_t>(run.count), run.level);
    share_of.insert(share_of.end(), static_cast<size_t>(run.count), static_cast<double>(run.query_rows) / queries[static_cast<size_t>(run.level)]);
  }
}

std::vector<double> Choices::damage(const Calibration& calibration, int64_t layer, int64_t group, int64_t kind, int64_t pair) const {
  const auto at_pair = static_cast<size_t>(pair);
  const auto table = calibration.damage.accessor<double, 5>()[layer][group][kind][std::min(level_of[at_pair], calibration.levels() - 1)];
  std::vector<double> result;
  for (const int64_t column : columns) {
    result.push_back(table[column] * share_of[at_pair]);
  }
  result.push_back(0);
  return result;
}

Allocation allocate(const Calibration& calibration, double budget, const BlockTree& tree, int64_t heads_per_group, const std::vector<int64_t>& buckets,
                    int64_t update_steps, Spending how, uint64_t seed, bool row_gates, const LatencyTable* latency) {
  check(ErrorKind::kUsage, budget > 0 && budget <= 1, "rank budget ", budget, ", expected more than 0 and at most 1");
  const int64_t layers = calibration.layers(), groups = calibration.groups(), levels = tree.num_levels(), d = calibration.head_dim();
  RankTable table(layers, groups, levels, {d, d});
  if (levels == 0 || budget == 1) {
    return {table, 0, 1};
  }

  check(ErrorKind::kUsage, !row_gates || calibration.gates.defined(), "the calibration has no row gates; make it again with this version");
  const Prices prices = latency != nullptr ? latency->prices(tree, groups, heads_per_group, d) : operation_prices(tree, groups, heads_per_group, d, update_steps);
  const Choices all(calibration, tree, buckets, prices);
  const std::vector<int64_t>& ranks = all.ranks;
  const size_t choices = ranks.size();

  // Costs by level, kind and choice, of one layer and group; of gates on a level; and of all its rows, open.
  std::vector<double> costs(static_cast<size_t>(levels) * 2 * choices, 0.0), gated_costs(static_cast<size_t>(levels), 0.0), open_costs = gated_costs;
  for (const PairRun& run : tree.runs()) {
    gated_costs[static_cast<size_t>(run.level)] += row_gates ? prices.gated(run) * static_cast<double>(run.count) : 0;
    open_costs[static_cast<size_t>(run.level)] += prices.open_rows(run) * static_cast<double>(run.count);
    for (size_t kind = 0; kind < 2; ++kind) {
      for (size_t c = 0; c < choices; ++c) {
        costs[(static_cast<size_t>(run.level) * 2 + kind) * choices + c] +=
            all.cost(run.first_pair, static_cast<int64_t>(kind), c) * static_cast<double>(run.count);
      }
    }
  }
  const double exact = static_cast<double>(layers) * prices.exact;
  const double fixed = static_cast<double>(layers) * prices.fixed;
  const double allowed = budget * exact - fixed;

  std::vector<Item> items;
  const auto table_of = calibration.damage.accessor<double, 5>();
  const at::Tensor gated_damage = row_gates ? calibration.gated_damage.contiguous() : at::zeros({0, 0, 0, 0, 0, 0, 0}, at::kDouble);
  const at::Tensor open_rows = row_gates ? calibration.open_rows.contiguous() : at::zeros({0, 0, 0, 0, 0}, at::kDouble);
  const auto gated_of = gated_damage.accessor<double, 7>();
  const auto open_of = open_rows.accessor<double, 5>();
  std::vector<float> gates;
  for (int64_t gate = 0; row_gates && gate < calibration.gates.size(0); ++gate) {
    gates.push_back(calibration.gates[gate].to(at::kFloat).item<float>());
  }
  const auto column = [&](size_t c) { return c + 1 < choices ? all.columns[c] : static_cast<int64_t>(calibration.ranks.size()); };
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t level = 0; level < levels; ++level) {
        const int64_t measured = std::min(level, calibration.levels() - 1);
        const auto damage = [&](int64_t kind, size_t c) { return c + 1 < choices ? table_of[layer][group][kind][measured][all.columns[c]] : 0; };
        const auto takes = [&](size_t kind, size_t c) { return costs[(static_cast<size_t>(level) * 2 + kind) * choices + c]; };
        Item& item = items.emplace_back();
        for (size_t qk = 0; qk < choices; ++qk) {
          for (size_t v = 0; v < choices; ++v) {
            const double low = takes(0, qk) + takes(1, v);
            for (size_t g = 0; g < gates.size() && (qk + 1 < choices || v + 1 < choices); ++g) {
              const auto gate = static_cast<int64_t>(g);
              const auto spoiled = [&](int64_t kind) { return gated_of[layer][group][kind][measured][column(qk)][column(v)][gate]; };
              const double open = gated_costs[static_cast<size_t>(level)] +
                                  open_of[layer][group][measured][column(qk)][gate] * open_costs[static_cast<size_t>(level)];
              item.options.push_back({spoiled(0) + spoiled(1), low + open, {ranks[qk], ranks[v], gates[g]}});
            }
            item.options.push_back({damage(0, qk) + damage(1, v), low, {ranks[qk], ranks[v]}});
          }
        }
      }
    }
  }

  // Chooses what is least by `value` for every item; returns what all of them cost.
  const auto choose_least = [&](const auto& value) {
    double used = 0;
    for (Item& item : items) {
      const auto less = [&](const Option& a, const Option& b) { return value(a) < value(b); };
      item.chosen = static_cast<size_t>(std::min_element(item.options.begin(), item.options.end(), less) - item.options.begin());
      used += item.now().cost;
    }
    return used;
  };
  const auto choose = [&](double price) { return choose_least([&](const Option& o) { return o.damage + price * o.cost; }); };
  const double least = choose_least([](const Option& o) { return o.cost; });
  check(ErrorKind::kUsage, least <= allowed, "rank budget ", budget, " cannot be met at ", tree.sequence_length(), " tokens: blocks of ",
        tree.geometry().near_block, ", sinks, Grams and ",
        latency != nullptr ? std::string("the fastest ranks") : c10::str("the smallest rank ", ranks.front()), " everywhere take ", (fixed + least) / exact,
        " of exact attention", latency != nullptr ? "'s time" : "");
  double price = 0;
  double left = allowed - least;
  if (how == Spending::kBest) {
    double low = 0, high = 1e-30;  // prices: too low, high enough
    while (choose(high) > allowed * (1 + 1e-12) + 1e-9) {
      low = high;
      high *= 4;
    }
    for (int step = 0; step < 100; ++step) {
      const double middle = 0.5 * (low + high);
      (choose(middle) <= allowed ? high : low) = middle;
    }
    price = high;
    left = allowed - choose(high);
  }
  if (how == Spending::kRandom) {
    std::mt19937_64 random(seed);
    std::vector<Item*> order;
    for (Item& item : items) {
      order.push_back(&item);
    }
    std::shuffle(order.begin(), order.end(), random);
    for (Item* item : order) {
      const size_t to = random() % item->options.size();
      const double cost = item->options[to].cost - item->now().cost;
      if (cost <= left) {
        left -= cost;
        item->chosen = to;
      }
    }
  }

  // What is left: the best single steps that fit, best first.
  while (how != Spending::kRandom) {
    double best = 0;
    Item* at = nullptr;
    size_t to = 0;
    for (Item& item : items) {
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
      break;
    }
    left -= at->options[to].cost - at->now().cost;
    at->chosen = to;
  }

  size_t next = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t level = 0; level < levels; ++level) {
        table.at(layer, group, level) = items[next++].now().ranks;
      }
    }
  }
  return {std::move(table), price, (fixed + allowed - left) / exact};
}

}  // namespace drrl
