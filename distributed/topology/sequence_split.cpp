#include "distributed/topology/sequence_split.h"

#include <algorithm>

#include "core/error.h"

namespace drrl {

SequenceSplit::SequenceSplit(BlockTree tree, int64_t parts)
    : tree_(std::move(tree)), parts_(parts) {
  check(ErrorKind::kUsage, tree_.num_blocks() >= 2 * parts, "a sequence of ",
        tree_.sequence_length(), " tokens has ", tree_.num_blocks(), " blocks of ",
        tree_.geometry().near_block, " after ", tree_.sinks(), " sinks; split over ", parts,
        " processes it needs at least ", 2 * parts);
}

IndexRange SequenceSplit::chunk(int64_t index) const {
  const auto begin_of = [&](int64_t c) {
    const int64_t token = tree_.sinks() +
                          tree_.num_blocks() * c / (2 * parts_) * tree_.geometry().near_block;
    return c == 0 ? 0 : std::min(token, tree_.sequence_length());
  };
  return {begin_of(index), begin_of(index + 1) - begin_of(index)};
}

at::Tensor SequenceSplit::positions(int64_t part) const {
  const auto of = [](const IndexRange& range) {
    return at::arange(range.begin, range.begin + range.count, at::kLong);
  };
  return at::cat({of(chunk(part)), of(chunk(2 * parts_ - 1 - part))});
}

int64_t SequenceSplit::rows_before(int64_t part, int64_t token) const {
  const auto before = [&](const IndexRange& range) {
    return std::clamp<int64_t>(token - range.begin, 0, range.count);
  };
  return before(chunk(part)) + before(chunk(2 * parts_ - 1 - part));
}

IndexRange SequenceSplit::rows_of(int64_t part, IndexRange tokens) const {
  const int64_t begin = rows_before(part, tokens.begin);
  return {begin, rows_before(part, tokens.begin + tokens.count) - begin};
}

BlockTree SequenceSplit::own_tree(int64_t part) const {
  return BlockTree(rows(part), {tree_.geometry().near_block, part == 0 ? tree_.sinks() : 0});
}

}  // namespace drrl
