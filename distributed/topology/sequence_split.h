#pragma once

#include <ATen/ATen.h>

#include "core/types/block_tree.h"
#include "core/types/index_range.h"

namespace drrl {

/// Which tokens of a sequence each of P processes computes (context parallelism), balanced for the
/// causal mask.
///
/// The blocks of the tree are cut into 2 P chunks, as even as possible; part i holds chunks i and 2
/// P - 1 - i (zigzag, as in Llama 3's training, arXiv 2407.21783 section 3.3.2), so that all parts
/// have as many pairs of a query and an earlier key. The sinks come before chunk 0. A part keeps
/// its tokens in the order of their positions; then every range of tokens of the sequence is a
/// range of rows of the part.
class SequenceSplit {
 public:
  /// Errors: Error(kUsage), naming the numbers, if there are fewer blocks than 2 P.
  SequenceSplit(BlockTree tree, int64_t parts);

  const BlockTree& tree() const noexcept { return tree_; }
  int64_t parts() const noexcept { return parts_; }
  /// Tokens of a part.
  int64_t rows(int64_t part) const { return rows_of(part, {0, tree_.sequence_length()}).count; }
  /// Their positions, ascending: [rows] int64.
  at::Tensor positions(int64_t part) const;
  /// The rows of a part that hold those tokens of a range that are the part's.
  IndexRange rows_of(int64_t part, IndexRange tokens) const;
  /// Sinks and blocks of the part as if it were a whole sequence.
  BlockTree own_tree(int64_t part) const;

 private:
  IndexRange chunk(int64_t index) const;
  int64_t rows_before(int64_t part, int64_t token) const;

  BlockTree tree_;
  int64_t parts_;
};

}  // namespace drrl
