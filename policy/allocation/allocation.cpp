#include "policy/allocation/allocation.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "core/error.h"
#include "policy/allocation/cost_model.h"
#include "policy/allocation/knapsack.h"
#include "policy/allocation/latency_table.h"

namespace drrl {

Allocation allocate(const Calibration& calibration, const BlockTree& tree,
                    const AllocationRequest& request) {
  const double budget = request.budget;
  const LatencyTable* latency = request.latency;
  check(ErrorKind::kUsage, budget > 0 && budget <= 1, "rank budget ", budget,
        ", expected more than 0 and at most 1");
  const int64_t layers = calibration.layers(), groups = calibration.groups(),
                levels = tree.num_levels(), d = calibration.head_dim();
  if (levels == 0 || budget == 1) {
    return {RankTable(layers, groups, levels, {d, d}), 0, 1};
  }
  const CostModel costs = cost_model_of(latency, tree, groups, request.heads_per_group, d,
                                        request.update_steps);
  std::vector<KnapsackItem> items = knapsack_items(calibration, tree, request.buckets, costs,
                                                   request.with_gates);
  const double exact = static_cast<double>(layers) * costs.exact;
  const double fixed = static_cast<double>(layers) * costs.fixed;
  const double allowed = budget * exact - fixed;

  // Chooses what is least by `value` for every item; returns what all of them cost.
  const auto choose_least = [&](const auto& value) {
    double used = 0;
    for (KnapsackItem& item : items) {
      const auto less = [&](const Candidate& a, const Candidate& b) { return value(a) < value(b); };
      item.chosen = static_cast<size_t>(
          std::min_element(item.candidates.begin(), item.candidates.end(), less) -
          item.candidates.begin());
      used += item.now().cost;
    }
    return used;
  };
  const auto choose = [&](double factor) {
    return choose_least([&](const Candidate& o) { return o.damage + factor * o.cost; });
  };
  const double least = choose_least([](const Candidate& o) { return o.cost; });
  check(ErrorKind::kUsage, least <= allowed, "rank budget ", budget, " cannot be met at ",
        tree.sequence_length(), " tokens: blocks of ", tree.geometry().near_block,
        ", sinks, Grams and ",
        latency != nullptr
            ? std::string("the fastest ranks")
            : c10::str("the smallest rank ", items.front().candidates.front().ranks.qk),
        " everywhere take ", (fixed + least) / exact, " of exact attention",
        latency != nullptr ? "'s time" : "");
  double lambda = 0;
  double left = allowed - least;
  if (request.method == AllocationMethod::kOptimal) {
    double low = 0, high = 1e-30;  // of lambda: too low, high enough
    while (choose(high) > allowed * (1 + 1e-12) + 1e-9) {
      low = high;
      high *= 4;
    }
    for (int step = 0; step < 100; ++step) {
      const double middle = 0.5 * (low + high);
      (choose(middle) <= allowed ? high : low) = middle;
    }
    lambda = high;
    left = allowed - choose(high);
  }
  if (request.method == AllocationMethod::kRandom) {
    std::mt19937_64 random(request.seed);
    std::vector<KnapsackItem*> order;
    for (KnapsackItem& item : items) {
      order.push_back(&item);
    }
    std::shuffle(order.begin(), order.end(), random);
    for (KnapsackItem* item : order) {
      const size_t to = random() % item->candidates.size();
      const double cost = item->candidates[to].cost - item->now().cost;
      if (cost <= left) {
        left -= cost;
        item->chosen = to;
      }
    }
  }

  if (request.method != AllocationMethod::kRandom) {
    left = assign_leftover(items, left);
  }
  return {chosen_ranks(items, layers, groups), lambda, (fixed + allowed - left) / exact};
}

}  // namespace drrl
