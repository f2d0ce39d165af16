#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "core/error.h"
#include "policy/allocation/cost_model.h"
#include "policy/allocation/latency_table.h"
#include "policy/allocation/rank_options.h"
#include "policy/calibration/calibration.h"

namespace drrl {

Choices::Choices(const Calibration& calibration, const BlockTree& tree,
                 const std::vector<int64_t>& buckets, const Prices& prices, bool with_gates)
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
    gated_costs.push_back(with_gates ? prices.gated(run) : 0);
    exact_costs.push_back(with_gates ? prices.exact_entries(run) : 0);
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
    share_of.insert(share_of.end(), static_cast<size_t>(run.count),
                    static_cast<double>(run.query_rows) / queries[static_cast<size_t>(run.level)]);
  }
}

int64_t Choices::calibrated_level(int64_t pair) const {
  return std::min(level_of[static_cast<size_t>(pair)], damage_.size(3) - 1);
}

double Choices::gate_cost(int64_t layer, int64_t group, int64_t pair, size_t i, int64_t gate,
                          double entries) const {
  const auto run = static_cast<size_t>(run_of[static_cast<size_t>(pair)]);
  const int64_t column = i < columns.size() ? columns[i] : exact_entries_.size(3) - 1;
  return gated_costs[run] +
         entries *
             exact_entries_
                 .accessor<double, 5>()[layer][group][calibrated_level(pair)][column][gate] *
             exact_costs[run];
}

double Choices::damage(int64_t layer, int64_t group, int64_t kind, int64_t pair, size_t i,
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

Allocation allocate(const Calibration& calibration, double budget, const BlockTree& tree,
                    int64_t heads_per_group, const std::vector<int64_t>& buckets,
                    int64_t update_steps, Spending how, uint64_t seed, bool with_gates,
                    const LatencyTable* latency) {
  check(ErrorKind::kUsage, budget > 0 && budget <= 1, "rank budget ", budget,
        ", expected more than 0 and at most 1");
  const int64_t layers = calibration.layers(), groups = calibration.groups(),
                levels = tree.num_levels(), d = calibration.head_dim();
  if (levels == 0 || budget == 1) {
    return {RankTable(layers, groups, levels, {d, d}), 0, 1};
  }
  const Prices prices = prices_of(latency, tree, groups, heads_per_group, d, update_steps);
  std::vector<RankItem> items = rank_items(calibration, tree, buckets, prices, with_gates);
  const double exact = static_cast<double>(layers) * prices.exact;
  const double fixed = static_cast<double>(layers) * prices.fixed;
  const double allowed = budget * exact - fixed;

  // Chooses what is least by `value` for every item; returns what all of them cost.
  const auto choose_least = [&](const auto& value) {
    double used = 0;
    for (RankItem& item : items) {
      const auto less = [&](const RankItem::Option& a, const RankItem::Option& b) {
        return value(a) < value(b);
      };
      item.chosen = static_cast<size_t>(
          std::min_element(item.options.begin(), item.options.end(), less) - item.options.begin());
      used += item.now().cost;
    }
    return used;
  };
  const auto choose = [&](double price) {
    return choose_least([&](const RankItem::Option& o) { return o.damage + price * o.cost; });
  };
  const double least = choose_least([](const RankItem::Option& o) { return o.cost; });
  check(ErrorKind::kUsage, least <= allowed, "rank budget ", budget, " cannot be met at ",
        tree.sequence_length(), " tokens: blocks of ", tree.geometry().near_block,
        ", sinks, Grams and ",
        latency != nullptr ? std::string("the fastest ranks")
                           : c10::str("the smallest rank ", items.front().options.front().ranks.qk),
        " everywhere take ", (fixed + least) / exact, " of exact attention",
        latency != nullptr ? "'s time" : "");
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
    std::vector<RankItem*> order;
    for (RankItem& item : items) {
      order.push_back(&item);
    }
    std::shuffle(order.begin(), order.end(), random);
    for (RankItem* item : order) {
      const size_t to = random() % item->options.size();
      const double cost = item->options[to].cost - item->now().cost;
      if (cost <= left) {
        left -= cost;
        item->chosen = to;
      }
    }
  }

  if (how != Spending::kRandom) {
    left = spend_left(items, left);
  }
  return {chosen_ranks(items, layers, groups), price, (fixed + allowed - left) / exact};
}

}  // namespace drrl
