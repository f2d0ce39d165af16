#pragma once

#include <memory>
#include <vector>

#include "policy/allocation/knapsack.h"
#include "policy/allocation/latency_table.h"
#include "policy/calibration/calibration.h"

namespace drrl {

/// Ranks for tensor-parallel processes that wait for each other after every layer's attention.
struct BalancedRanks {
  RankTable table;
  double damage;  ///< calibrated [nats per token]
  std::vector<std::vector<double>>
      costs;  ///< [layers][processes] of one sequence, in the unit of the prices

  /// What a process has to do in all layers.
  double cost(size_t process) const;
  /// How long attention takes at these speeds, as every layer waits for its slowest process: the
  /// sum over layers of the largest cost / speed.
  double time(const std::vector<double>& speeds) const;
};

/// Makes up for processes that are slower than others, or hold more KV groups: smaller ranks for
/// them, larger ones, up to exact attention, for those that would wait.
///
/// The plain ranks are those of `allocate` at a budget. At given speeds each layer gets a time T_l,
/// and each process the ranks of least damage that fit into it; sum over layers of T_l is made
/// small while the damage of all stays within that of the plain ranks and `damage` more. What
/// damage a process still does within T is a step function (along the convex hull of its choices),
/// and so is their sum: the steps of all layers are taken in the order of what they save for their
/// time until the damage is allowed. Nobody is made faster, though, than the fastest process is
/// with the plain ranks: where all are equal, nothing is spent.
class RankBalance {
 public:
  struct Options {
    double budget = 1;  ///< of the plain ranks, and the next four: as for allocate()
    std::vector<int64_t> buckets = {};
    int64_t update_steps = 2;
    bool with_gates = false;
    std::shared_ptr<const LatencyTable> latency = nullptr;
    double damage = 0.005;  ///< that may be added [nats per token]
  };

  /// groups: how many KV groups each process holds, in the order of the model; 0 too. Errors: as
  /// allocate(); Error(kUsage) for a negative damage.
  RankBalance(const Calibration& calibration, const BlockTree& tree, int64_t heads_per_group,
              std::vector<int64_t> groups, const Options& options);

  const BalancedRanks& plain() const { return plain_; }

  /// Deterministic. speeds: of each process, positive, in any unit; of one without KV groups it
  /// does not matter. Errors: Error(kUsage).
  BalancedRanks ranks(const std::vector<double>& speeds) const;

 private:
  /// A dearer choice of an item that spoils less.
  struct Step {
    size_t item;
    size_t to;
    double cost, saved;
  };
  /// One process's part of a layer: its items [begin, end), and the steps from the cheapest choices
  /// of all of them, those that save most for their cost first.
  struct Part {
    size_t begin, end;
    double cost, damage;  ///< of the cheapest choices, with what no rank changes
    std::vector<Step> steps;
  };

  BalancedRanks balanced(const std::vector<KnapsackItem>& items) const;
  Part part(int64_t layer, size_t process) const;

  int64_t layers_, groups_of_model_, levels_;
  double allowed_;    // damage
  double fixed_ = 0;  // what no rank changes, of a layer and KV group
  std::vector<int64_t> groups_;
  std::vector<KnapsackItem> items_;       // at their cheapest choices
  std::vector<std::vector<Part>> parts_;  // [layers][processes]
  BalancedRanks plain_;
};

}  // namespace drrl
