#include "core/types/block_tree.h"

#include <algorithm>

#include <c10/util/Exception.h>

namespace drrl {

BlockTree::BlockTree(int64_t sequence_length, Geometry geometry)
    : sequence_length_(sequence_length), geometry_(geometry) {
  TORCH_CHECK(sequence_length >= 1, "BlockTree: sequence_length ", sequence_length,
              ", expected at least 1");
  TORCH_CHECK(geometry.near_block >= 1, "BlockTree: near_block ", geometry.near_block,
              ", expected at least 1");
  TORCH_CHECK(geometry.sink_tokens >= 0, "BlockTree: sink_tokens ", geometry.sink_tokens,
              ", expected at least 0");
  const int64_t block = geometry.near_block;
  sinks_ = std::min(geometry.sink_tokens, sequence_length);
  const int64_t rest = sequence_length - sinks_;
  num_blocks_ = (rest + block - 1) / block;
  last_block_rows_ = num_blocks_ == 0 ? 0 : rest - (num_blocks_ - 1) * block;

  int64_t pair = 0;
  for (int64_t node = 1; node < num_blocks_; node *= 2) {  // node: blocks in one node of this level
    const int64_t rows = node * block;
    const int64_t stride = 2 * rows;
    // Pairs whose right node is complete, then the one whose right node is cut off by the end of
    // the sequence.
    const int64_t full = rest / stride;
    if (full > 0) {
      runs_.push_back({num_levels_, pair, full, sinks_, rows, sinks_ + rows, rows, stride});
      pair += full;
    }
    const int64_t left_over = rest - full * stride - rows;
    if (left_over > 0) {
      const int64_t begin = sinks_ + full * stride;
      runs_.push_back({num_levels_, pair, 1, begin, rows, begin + rows, left_over, stride});
      pair += 1;
    }
    ++num_levels_;
  }
}

int64_t BlockTree::pair_index(int64_t level, int64_t i) const {
  const auto first = std::find_if(runs_.begin(), runs_.end(),
                                  [&](const PairRun& run) { return run.level == level; });
  int64_t count = 0;
  for (auto run = first; run != runs_.end() && run->level == level; ++run) {
    count += run->count;
  }
  TORCH_CHECK(i >= 0 && i < count, "BlockTree: no pair ", i, " on level ", level, " of ",
              num_blocks_, " blocks");
  return first->first_pair + i;
}

const PairRun& BlockTree::run_of(int64_t pair) const {
  for (const PairRun& run : runs_) {
    if (pair >= run.first_pair && pair < run.first_pair + run.count) {
      return run;
    }
  }
  TORCH_CHECK(false, "BlockTree: pair ", pair, " of ", num_pairs());
}

}  // namespace drrl
