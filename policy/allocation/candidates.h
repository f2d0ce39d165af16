#pragma once

#include <cstdint>
#include <vector>

#include <ATen/ATen.h>

#include "core/types/block_tree.h"
#include "policy/allocation/cost_model.h"
#include "policy/calibration/calibration.h"

namespace drrl {

/// What can be chosen for the far pairs of one tree, and what it costs and spoils.
class RankCandidates {
 public:
  /// `buckets` is the device's list; only those that were calibrated are choices, and head_dim
  /// itself, exact, the last one. with_gates: and the calibrated gates. Errors: Error(kUsage) if
  /// there are none.
  RankCandidates(const Calibration& calibration, const BlockTree& tree,
                 const std::vector<int64_t>& buckets, const CostModel& cost_model,
                 bool with_gates = false);

  /// What one pair costs at choice i, everything that depends on it counted.
  double cost(int64_t pair, int64_t kind, size_t i) const {
    return costs[(static_cast<size_t>(run_of[static_cast<size_t>(pair)]) * 2 +
                  static_cast<size_t>(kind)) *
                     ranks.size() +
                 i];
  }
  /// What a gate adds to that of a pair whose scores are at choice i: itself and, times `entries`,
  /// as many exact entries as the calibration met.
  double gate_cost(int64_t layer, int64_t group, int64_t pair, size_t i, int64_t gate,
                   double entries = 1) const;
  /// One pair's share of its level's calibrated damage, by its queries, at choice i and a gate, -1:
  /// none [nats per token of the sequence]; distances beyond the calibrated levels are taken to
  /// suffer like the last one.
  double damage(int64_t layer, int64_t group, int64_t kind, int64_t pair, size_t i,
                int64_t gate = -1) const;

  std::vector<int64_t> ranks;
  std::vector<int64_t> columns;   ///< of Calibration::damage, for all but the last
  std::vector<int64_t> run_of;    ///< of each pair
  std::vector<int64_t> level_of;  ///< of each pair
  std::vector<double> share_of;   ///< of each pair: its queries over those of its level
  std::vector<float> gates;       ///< without gates empty
  std::vector<double> costs;      ///< [runs, 2, choices]
  std::vector<double> gated_costs,
      exact_costs;  ///< of a pair of each run: a gate, all its entries exact

 private:
  int64_t calibrated_level(int64_t pair) const;

  at::Tensor damage_, gated_damage_, exact_entries_;  // the calibration's, contiguous
};

}  // namespace drrl
