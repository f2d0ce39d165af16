#include "policy/allocation/straggler_balance.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <span>
#include <utility>

#include "core/error.h"
#include "policy/allocation/allocation.h"

namespace drrl {
namespace {

struct Point {
  double cost, damage;
};

// The points on the lower convex hull, from the cheapest to the one that does least damage.
std::vector<size_t> lower_hull(const std::vector<Point>& points) {
  std::vector<size_t> order(points.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::pair(points[a].cost, points[a].damage) <
           std::pair(points[b].cost, points[b].damage);
  });
  // What going from a to b saves for its cost.
  const auto slope = [&](size_t a, size_t b) {
    return (points[a].damage - points[b].damage) / (points[b].cost - points[a].cost);
  };
  std::vector<size_t> hull;
  for (const size_t i : order) {
    if (!hull.empty() && points[i].damage >= points[hull.back()].damage) {
      continue;
    }
    while (hull.size() > 1 && slope(hull.back(), i) >= slope(hull[hull.size() - 2], hull.back())) {
      hull.pop_back();
    }
    hull.push_back(i);
  }
  return hull;
}

}  // namespace

double BalancedRanks::cost(size_t process) const {
  return std::accumulate(costs.begin(), costs.end(), 0.0,
                         [&](double sum, const auto& layer) { return sum + layer[process]; });
}

double BalancedRanks::time(const std::vector<double>& speeds) const {
  double sum = 0;
  for (const auto& layer : costs) {
    double most = 0;
    for (size_t p = 0; p < layer.size(); ++p) {
      most = layer[p] > 0 ? std::max(most, layer[p] / speeds[p]) : most;
    }
    sum += most;
  }
  return sum;
}

RankBalance::RankBalance(const Calibration& calibration, const BlockTree& tree,
                         int64_t heads_per_group, std::vector<int64_t> groups,
                         const Options& options)
    : layers_(calibration.layers()),
      groups_of_model_(calibration.groups()),
      levels_(tree.num_levels()),
      groups_(std::move(groups)),
      plain_{allocate(calibration, tree,
                      {.budget = options.budget,
                       .heads_per_group = heads_per_group,
                       .buckets = options.buckets,
                       .update_steps = options.update_steps,
                       .with_gates = options.with_gates,
                       .latency = options.latency.get()})
                 .table,
             0,
             {}} {
  check(ErrorKind::kUsage,
        std::accumulate(groups_.begin(), groups_.end(), int64_t{0}) == groups_of_model_ &&
            std::all_of(groups_.begin(), groups_.end(), [](int64_t n) { return n >= 0; }),
        "processes of ", groups_, " KV groups, expected ", groups_of_model_, " in all");
  check(ErrorKind::kUsage, options.damage >= 0, "damage that balance may add is ", options.damage,
        ", expected at least 0");
  const int64_t d = calibration.head_dim();
  const CostModel costs = cost_model_of(options.latency.get(), tree, groups_of_model_,
                                        heads_per_group, d, options.update_steps);
  fixed_ = costs.fixed / static_cast<double>(groups_of_model_);
  items_ = knapsack_items(calibration, tree, options.buckets, costs, options.with_gates);
  std::vector<KnapsackItem> items = items_;
  for (size_t i = 0; i < items.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    const Ranks& ranks = plain_.table.at(at / levels_ / groups_of_model_,
                                         at / levels_ % groups_of_model_, at % levels_);
    const auto found = std::find_if(items[i].candidates.begin(), items[i].candidates.end(),
                                    [&](const Candidate& o) { return o.ranks == ranks; });
    items[i].chosen = static_cast<size_t>(found - items[i].candidates.begin());
    const auto cheaper = [](const Candidate& a, const Candidate& b) {
      return std::pair(a.cost, a.damage) < std::pair(b.cost, b.damage);
    };
    items_[i].chosen = static_cast<size_t>(
        std::min_element(items_[i].candidates.begin(), items_[i].candidates.end(), cheaper) -
        items_[i].candidates.begin());
  }
  plain_ = balanced(items);
  allowed_ = plain_.damage + options.damage;
  for (int64_t layer = 0; layer < layers_; ++layer) {
    auto& parts = parts_.emplace_back();
    for (size_t p = 0; p < groups_.size(); ++p) {
      parts.push_back(part(layer, p));
    }
  }
}

RankBalance::Part RankBalance::part(int64_t layer, size_t process) const {
  const int64_t first = std::accumulate(groups_.begin(),
                                        groups_.begin() + static_cast<std::ptrdiff_t>(process),
                                        layer * groups_of_model_);
  Part part{static_cast<size_t>(first * levels_),
            static_cast<size_t>((first + groups_[process]) * levels_),
            fixed_ * static_cast<double>(groups_[process]),
            0,
            {}};
  for (size_t i = part.begin; i < part.end; ++i) {
    const KnapsackItem& item = items_[i];
    part.cost += item.now().cost;
    part.damage += item.now().damage;
    std::vector<Point> points;
    for (const Candidate& option : item.candidates) {
      points.push_back({option.cost, option.damage});
    }
    const std::vector<size_t> hull = lower_hull(points);
    for (size_t h = 1; h < hull.size(); ++h) {
      const Point &from = points[hull[h - 1]], &to = points[hull[h]];
      part.steps.push_back({i, hull[h], to.cost - from.cost, from.damage - to.damage});
    }
  }
  std::stable_sort(part.steps.begin(), part.steps.end(), [](const Step& a, const Step& b) {
    return a.saved * b.cost > b.saved * a.cost;
  });
  return part;
}

BalancedRanks RankBalance::balanced(const std::vector<KnapsackItem>& items) const {
  BalancedRanks result{chosen_ranks(items, layers_, groups_of_model_), 0, {}};
  size_t next = 0;
  for (int64_t layer = 0; layer < layers_; ++layer) {
    auto& costs = result.costs.emplace_back();
    for (const int64_t groups : groups_) {
      costs.push_back(fixed_ * static_cast<double>(groups));
      for (int64_t i = 0; i < groups * levels_; ++i) {
        costs.back() += items[next].now().cost;
        result.damage += items[next++].now().damage;
      }
    }
  }
  return result;
}

BalancedRanks RankBalance::ranks(const std::vector<double>& speeds) const {
  check(ErrorKind::kUsage,
        speeds.size() == groups_.size() &&
            std::all_of(speeds.begin(), speeds.end(), [](double s) { return s > 0; }),
        "speeds ", speeds, ", expected ", groups_.size(), " positive ones");
  // Each layer at first: as fast as its slowest process can be, everybody at the best that fits.
  // Then the ways to give it more time.
  struct Move {
    size_t layer;
    double time, saved, until;
  };
  std::vector<double> times;
  std::vector<Move> moves;
  double damage = 0, total = 0;
  for (size_t layer = 0; layer < parts_.size(); ++layer) {
    double least = 0, left = 0;
    std::vector<Point>
        steps;  // time at which a process can take its next step, and what that saves
    for (size_t p = 0; p < groups_.size(); ++p) {
      const Part& part = parts_[layer][p];
      least = std::max(least, part.cost / speeds[p]);
      left += part.damage;
      double cost = part.cost;
      for (const Step& step : part.steps) {
        steps.push_back({(cost += step.cost) / speeds[p], step.saved});
      }
    }
    std::stable_sort(steps.begin(), steps.end(),
                     [](const Point& a, const Point& b) { return a.cost < b.cost; });
    std::vector<Point> points{{least, left}};
    for (const Point& step : steps) {
      left -= step.damage;
      points.push_back({std::max(step.cost, least), left});
    }
    const std::vector<size_t> hull = lower_hull(points);
    times.push_back(points[hull[0]].cost);
    total += times.back();
    damage += points[hull[0]].damage;
    for (size_t h = 1; h < hull.size(); ++h) {
      const Point &from = points[hull[h - 1]], &to = points[hull[h]];
      moves.push_back({layer, to.cost - from.cost, from.damage - to.damage, to.cost});
    }
  }
  double fastest = std::numeric_limits<double>::infinity();
  for (size_t p = 0; p < groups_.size(); ++p) {
    fastest = groups_[p] > 0 ? std::min(fastest, plain_.cost(p) / speeds[p]) : fastest;
  }
  std::stable_sort(moves.begin(), moves.end(), [](const Move& a, const Move& b) {
    return a.saved * b.time > b.saved * a.time;
  });
  for (const Move& move : moves) {
    if (damage <= allowed_ && total >= fastest * (1 - 1e-9)) {
      break;
    }
    times[move.layer] = move.until;
    total += move.time;
    damage -= move.saved;
  }

  std::vector<KnapsackItem> items = items_;
  for (size_t layer = 0; layer < parts_.size(); ++layer) {
    for (size_t p = 0; p < groups_.size(); ++p) {
      const Part& part = parts_[layer][p];
      double cost = part.cost;
      for (const Step& step : part.steps) {
        if ((cost + step.cost) / speeds[p] > times[layer]) {
          break;
        }
        cost += step.cost;
        items[step.item].chosen = step.to;
      }
      assign_leftover(std::span(items).subspan(part.begin, part.end - part.begin),
                      times[layer] * speeds[p] - cost);
    }
  }
  return balanced(items);
}

}  // namespace drrl
