#pragma once

#include <cstdint>
#include <functional>

#include "core/attention/flops.h"
#include "core/types/block_tree.h"

namespace drrl {

/// What the attention of one layer costs by its ranks, on sequences of one tree: what an allocation
/// of ranks spends. Operations, or time (latency_table.h), in a unit so small that a whole one does
/// not matter.
struct CostModel {
  double exact = 0;  ///< exact attention, all KV groups
  double fixed = 0;  ///< what no rank changes, all KV groups: exact blocks, sinks, Grams of blocks
                     ///< and of W_O
  /// One pair of a run, of one KV group, at a rank of its scores or values, with all that depends
  /// on it: its product, projections, basis.
  std::function<double(const PairRun& run, FarKind kind, int64_t rank)> pair;
  std::function<double(const PairRun& run)>
      gated;  ///< a gate on such a pair, before it makes anything exact
  std::function<double(const PairRun& run)> exact_entries;  ///< all entries of such a pair exact
};

/// Operations as core/attention/flops.h counts them, but entries that gates make exact at eight
/// times theirs, as they take that long; forward, bases updated in `update_steps` steps or solved;
/// W_O is taken to be square.
CostModel flops_cost_model(const BlockTree& tree, int64_t groups, int64_t heads_per_group,
                           int64_t head_dim, int64_t update_steps);

}  // namespace drrl
