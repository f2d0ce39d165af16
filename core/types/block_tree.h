#pragma once

#include <cstdint>
#include <vector>

namespace drrl {

/// Which tokens are attended exactly.
struct Geometry {
  int64_t near_block = 256;  ///< B: tokens of one exact block, >= 1
  int64_t sink_tokens = 4;   ///< s: tokens at the start of the sequence that everybody attends
                             ///< exactly, >= 0

  bool operator==(const Geometry&) const = default;
};

/// `count` equal far interactions of one tree level: pair i lets the queries [query_begin + i
/// stride, + query_rows) see the keys [key_begin + i stride, + key_rows), all of which are older.
/// All pairs of a run go through one batched call.
struct PairRun {
  int64_t level;
  int64_t first_pair;  ///< index of pair 0 of this run among all pairs of the tree
  int64_t count;
  int64_t key_begin, key_rows;
  int64_t query_begin, query_rows;
  int64_t stride;
};

/// The partition of causal attention over L tokens into sinks, exact blocks and far pairs (a HODLR
/// tree).
///
/// The first s tokens are the sinks. The rest is cut into blocks of B tokens, the last one possibly
/// short; every token attends exactly to the sinks and causally to its own block. Level j joins
/// neighbouring nodes of 2^j blocks: the queries of each odd node see all keys of the even node to
/// its left. Sinks, blocks and pairs together cover each (query, earlier key) exactly once.
///
/// Keys of a pair always form a complete node of 2^j B tokens; only the queries of a level's last
/// pair may be fewer.
class BlockTree {
 public:
  /// Errors: c10::Error if sequence_length < 1, near_block < 1 or sink_tokens < 0.
  BlockTree(int64_t sequence_length, Geometry geometry);

  int64_t sequence_length() const noexcept { return sequence_length_; }
  const Geometry& geometry() const noexcept { return geometry_; }
  /// Sinks that exist: min(s, L).
  int64_t sinks() const noexcept { return sinks_; }
  /// Blocks after the sinks, the last one of last_block_rows() tokens. 0 if the sequence is all
  /// sinks.
  int64_t num_blocks() const noexcept { return num_blocks_; }
  int64_t last_block_rows() const noexcept { return last_block_rows_; }
  /// Number of far pairs: num_blocks() - 1, or 0.
  int64_t num_pairs() const noexcept { return num_blocks_ > 0 ? num_blocks_ - 1 : 0; }
  /// Number of pair `i` of a level among all pairs. Errors: c10::Error if there is no such pair.
  int64_t pair_index(int64_t level, int64_t i) const;
  /// The run that pair number `pair` of the tree is in. Errors: c10::Error if there is no such
  /// pair.
  const PairRun& run_of(int64_t pair) const;
  int64_t num_levels() const noexcept { return num_levels_; }
  /// Level by level, from the shortest to the longest distance; at most two runs a level. Pairs are
  /// numbered in this order.
  const std::vector<PairRun>& runs() const noexcept { return runs_; }

 private:
  int64_t sequence_length_;
  Geometry geometry_;
  int64_t sinks_;
  int64_t num_blocks_;
  int64_t last_block_rows_;
  int64_t num_levels_ = 0;
  std::vector<PairRun> runs_;
};

}  // namespace drrl
