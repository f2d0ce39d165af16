#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "core/cost.h"
#include "core/error.h"
#include "policy/calibration.h"

namespace drrl {
namespace {

// One far kind of one layer, KV group and level: what each choice costs and spoils.
struct Item {
  const double* damage;      // of choice i; the last choice, exact, does none
  const double* operations;  // of choice i
  size_t chosen;
};

}  // namespace

Choices::Choices(const Calibration& calibration, const BlockTree& tree, int64_t heads_per_group, const std::vector<int64_t>& buckets, int64_t update_steps) {
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
        const double form = kind == 0 ? residual_factor_flops(d, rank) : 0;
        const double basis = rank == d ? 0 : form + (update_steps >= 0 ? basis_update_flops(d, rank, update_steps) : basis_solve_flops(d));
        costs.push_back(far_pair_flops(run, static_cast<FarKind>(kind), rank, heads_per_group, d, /*with_backward=*/false).total() + basis);
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
                    int64_t update_steps, Spending how, uint64_t seed) {
  check(ErrorKind::kUsage, budget > 0 && budget <= 1, "rank budget ", budget, ", expected more than 0 and at most 1");
  const int64_t layers = calibration.layers(), groups = calibration.groups(), levels = tree.num_levels(), d = calibration.head_dim();
  RankTable table(layers, groups, levels, {d, d});
  if (levels == 0 || budget == 1) {
    return {table, 0};
  }

  const Choices all(calibration, tree, heads_per_group, buckets, update_steps);
  const std::vector<int64_t>& ranks = all.ranks;
  const std::vector<int64_t>& columns = all.columns;
  const size_t choices = ranks.size();

  // Operations by level, kind and choice, of one layer and group.
  std::vector<double> operations(static_cast<size_t>(levels) * 2 * choices, 0.0);
  for (const PairRun& run : tree.runs()) {
    for (size_t kind = 0; kind < 2; ++kind) {
      for (size_t c = 0; c < choices; ++c) {
        operations[(static_cast<size_t>(run.level) * 2 + kind) * choices + c] +=
            all.operations(run.first_pair, static_cast<int64_t>(kind), c) * static_cast<double>(run.count);
      }
    }
  }
  const int64_t heads = groups * heads_per_group;
  const double exact = static_cast<double>(layers) * exact_attention_flops(1, heads, tree.sequence_length(), d, false);
  const double fixed = static_cast<double>(layers) * exact_part_flops(tree, 1, heads, groups, d, false).total();
  const double allowed = budget * exact - fixed;

  std::vector<double> damages;  // [layers, groups, 2, levels, choices]
  std::vector<Item> items;
  damages.reserve(static_cast<size_t>(layers * groups * 2 * levels) * choices);
  const auto table_of = calibration.damage.accessor<double, 5>();
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t kind = 0; kind < 2; ++kind) {
        for (int64_t level = 0; level < levels; ++level) {
          items.push_back({damages.data() + damages.size(), operations.data() + static_cast<size_t>(level * 2 + kind) * choices, 0});
          for (const int64_t column : columns) {
            damages.push_back(table_of[layer][group][kind][std::min(level, calibration.levels() - 1)][column]);
          }
          damages.push_back(0);
        }
      }
    }
  }

  // Chooses for one price of an operation; returns the operations.
  const auto choose = [&](double price) {
    double used = 0;
    for (Item& item : items) {
      for (size_t c = 0; c < choices; ++c) {
        const auto value = [&](size_t i) { return item.damage[i] + price * item.operations[i]; };
        item.chosen = c == 0 || value(c) < value(item.chosen) ? c : item.chosen;
      }
      used += item.operations[item.chosen];
    }
    return used;
  };
  double least = 0;
  for (const Item& item : items) {
    least += *std::min_element(item.operations, item.operations + choices);
  }
  check(ErrorKind::kUsage, least <= allowed, "rank budget ", budget, " cannot be met at ", tree.sequence_length(), " tokens: blocks of ",
        tree.geometry().near_block, ", sinks, Grams and the smallest rank ", ranks.front(), " everywhere take ", (fixed + least) / exact,
        " of exact attention");
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
  } else {
    for (Item& item : items) {
      item.chosen = static_cast<size_t>(std::min_element(item.operations, item.operations + choices) - item.operations);
    }
  }
  if (how == Spending::kRandom) {
    std::mt19937_64 random(seed);
    std::vector<Item*> order;
    for (Item& item : items) {
      order.push_back(&item);
    }
    std::shuffle(order.begin(), order.end(), random);
    for (Item* item : order) {
      const size_t to = random() % choices;
      const double cost = item->operations[to] - item->operations[item->chosen];
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
      for (size_t c = 0; c < choices; ++c) {
        const double gain = item.damage[item.chosen] - item.damage[c];
        const double cost = item.operations[c] - item.operations[item.chosen];
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
    left -= at->operations[to] - at->operations[at->chosen];
    at->chosen = to;
  }

  size_t next = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t kind = 0; kind < 2; ++kind) {
        for (int64_t level = 0; level < levels; ++level) {
          Ranks& r = table.at(layer, group, level);
          (kind == 0 ? r.qk : r.v) = ranks[items[next++].chosen];
        }
      }
    }
  }
  return {std::move(table), price};
}

}  // namespace drrl
