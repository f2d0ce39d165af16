#pragma once

#include <cstdint>
#include <vector>

#include "core/types/block_tree.h"
#include "policy/calibration/calibration.h"
#include "policy/rank_table.h"

namespace drrl {

class LatencyTable;

/// How a budget is shared out. kOptimal: by a Lagrangian relaxation, below. kGreedy: from the
/// smallest ranks everywhere, always the step that saves most damage for its cost. kRandom: any
/// candidates that fit, whatever they damage, by a seed; the baseline that everything must beat.
enum class AllocationMethod { kOptimal, kGreedy, kRandom };

struct AllocationRequest {
  double budget;  ///< share of exact attention's operations, or time
  int64_t heads_per_group;
  std::vector<int64_t> buckets;  ///< ranks that the device runs without waste
  int64_t update_steps = 2;      ///< rounds in which bases are updated; a latency table has its own
  AllocationMethod method = AllocationMethod::kOptimal;
  uint64_t seed = 0;                      ///< of kRandom
  bool with_gates = false;                ///< gates are chosen along with the ranks
  const LatencyTable* latency = nullptr;  ///< null: the budget is one of operations
};

struct Allocation {
  RankTable table;
  double lambda;  ///< what the last unit of cost (operation or ns) saved, in nats per token; 0
                  ///< unless kOptimal
  double cost;    ///< of everything, as a share of exact attention's: at most the budget, but for
                  ///< rounding
};

/// The ranks of least total damage whose attention, everything counted (core/attention/flops.h,
/// forward), costs at most the budget. Damages are taken as additive; distances beyond the
/// calibrated levels are taken to suffer like the last one. As many entries are taken to be exact
/// under gates as the calibration met; on another text they are what they are.
///
/// A Lagrangian relaxation of the knapsack: every item takes the candidate of least damage + lambda
/// x cost, with the smallest lambda that fits; what is left of the budget goes into the best
/// further steps. Optimal up to the last step (the items are many and each is small).
///
/// Errors: Error(kUsage) for a budget outside (0, 1] or one that no allocation meets; for gates
/// that the calibration lacks; for a latency table of another shape, or that lacks a rank of
/// `buckets` that was calibrated or its gates.
Allocation allocate(const Calibration& calibration, const BlockTree& tree,
                    const AllocationRequest& request);

}  // namespace drrl
