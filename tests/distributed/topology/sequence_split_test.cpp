#include "distributed/topology/sequence_split.h"

#include <algorithm>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/error_of.h"

namespace drrl {
namespace {

std::vector<int64_t> positions(const SequenceSplit& split, int64_t part) {
  const at::Tensor p = split.positions(part);
  return {p.const_data_ptr<int64_t>(), p.const_data_ptr<int64_t>() + p.numel()};
}

TEST(SequenceSplit, EveryTokenHasOnePartAndBlocksStayWhole) {
  for (const int64_t parts : {1, 2, 3, 4, 5}) {
    for (const Geometry geometry : {Geometry{8, 2}, Geometry{5, 0}}) {
      for (int64_t length =
               geometry.sink_tokens + geometry.near_block * 2 * parts - geometry.near_block + 1;
           length < 130; length += 3) {
        SCOPED_TRACE(::testing::Message() << parts << " parts of " << length
                                          << " tokens in blocks of " << geometry.near_block);
        const SequenceSplit split(BlockTree(length, geometry), parts);
        std::vector<int64_t> owner(static_cast<size_t>(length), -1);
        for (int64_t part = 0; part < parts; ++part) {
          const auto own = positions(split, part);
          EXPECT_EQ(static_cast<int64_t>(own.size()), split.rows(part));
          EXPECT_TRUE(std::is_sorted(own.begin(), own.end()));
          for (const int64_t position : own) {
            EXPECT_EQ(owner[static_cast<size_t>(position)], -1);
            owner[static_cast<size_t>(position)] = part;
          }
          const BlockTree tree = split.own_tree(part);
          EXPECT_EQ(tree.sequence_length(), split.rows(part));
          // A block of the part is a block of the sequence.
          for (size_t row = static_cast<size_t>(tree.sinks()) + 1; row < own.size(); ++row) {
            const bool begins = (static_cast<int64_t>(row) - tree.sinks()) % geometry.near_block ==
                                0;
            EXPECT_EQ(begins, (own[row] - split.tree().sinks()) % geometry.near_block == 0)
                << "row " << row;
            EXPECT_TRUE(begins || own[row] == own[row - 1] + 1) << "row " << row;
          }
        }
        EXPECT_EQ(std::count(owner.begin(), owner.end(), -1), 0);
      }
    }
  }
}

TEST(SequenceSplit, RangesOfTokensAreRangesOfRows) {
  const SequenceSplit split(BlockTree(83, {8, 3}), 3);
  for (int64_t part = 0; part < 3; ++part) {
    const auto own = positions(split, part);
    for (int64_t begin = 0; begin < 83; ++begin) {
      for (int64_t count = 0; begin + count <= 83; ++count) {
        const auto first = std::lower_bound(own.begin(), own.end(), begin),
                   last = std::lower_bound(own.begin(), own.end(), begin + count);
        const IndexRange rows = split.rows_of(part, {begin, count});
        EXPECT_EQ(rows.count, last - first);
        EXPECT_TRUE(rows.count == 0 || rows.begin == first - own.begin());
      }
    }
  }
}

TEST(SequenceSplit, PartsHaveEqualWork) {
  for (const int64_t parts : {2, 3, 4}) {
    const SequenceSplit split(BlockTree(16 * 2 * parts * 4, {16, 0}), parts);
    std::vector<int64_t> work;  // pairs of a query and an earlier key
    for (int64_t part = 0; part < parts; ++part) {
      work.push_back(0);
      for (const int64_t position : positions(split, part)) {
        work.back() += position + 1;
      }
    }
    EXPECT_EQ(*std::min_element(work.begin(), work.end()),
              *std::max_element(work.begin(), work.end()))
        << parts << " parts";
  }
}

TEST(SequenceSplit, RefusesTooFewBlocks) {
  const std::string message = error_of(ErrorKind::kUsage,
                                       [] { SequenceSplit(BlockTree(26, {8, 2}), 2); });
  EXPECT_NE(
      message.find(
          "26 tokens has 3 blocks of 8 after 2 sinks; split over 2 processes it needs at least 4"),
      std::string::npos)
      << message;
}

}  // namespace
}  // namespace drrl
