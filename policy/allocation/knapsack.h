#pragma once

#include <span>
#include <vector>

#include "core/types/ranks.h"
#include "policy/allocation/cost_model.h"
#include "policy/calibration/calibration.h"

namespace drrl {

/// A choice of ranks, and of a gate, for far pairs.
struct Candidate {
  double damage;  ///< calibrated [nats per token]
  double cost;    ///< in the unit of the cost model
  Ranks ranks;
};

/// The far pairs of one layer, KV group and tree level, which choose together.
struct KnapsackItem {
  std::vector<Candidate> candidates;  ///< the last one, exact, does no damage
  size_t chosen = 0;

  const Candidate& now() const { return candidates[chosen]; }
};

/// The items of all layers, KV groups and levels, level innermost. with_gates: with gates along
/// with ranks; the entries that they make exact are as many as the calibration met.
std::vector<KnapsackItem> knapsack_items(const Calibration& calibration, const BlockTree& tree,
                                         const std::vector<int64_t>& buckets,
                                         const CostModel& cost_model, bool with_gates);

/// Takes the single steps that save most damage for their cost among those that fit into `left`,
/// best first. Returns what is left in the end.
double assign_leftover(std::span<KnapsackItem> items, double left);

/// What is chosen, as a table. items: as knapsack_items returns them for so many layers and groups.
RankTable chosen_ranks(const std::vector<KnapsackItem>& items, int64_t layers, int64_t groups);

}  // namespace drrl
