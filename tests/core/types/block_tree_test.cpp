#include "core/types/block_tree.h"

#include <vector>

#include <gtest/gtest.h>

namespace drrl {
namespace {

// Every (query, key <= query) must be covered exactly once by sinks, own block or one far pair, and
// nothing else may be.
void expect_exact_cover(int64_t length, Geometry geometry) {
  SCOPED_TRACE(::testing::Message() << "L = " << length << ", B = " << geometry.near_block
                                    << ", s = " << geometry.sink_tokens);
  const BlockTree tree(length, geometry);
  std::vector<std::vector<int>> covered(length, std::vector<int>(length, 0));
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t j = 0; j <= t && j < tree.sinks(); ++j) {
      ++covered[t][j];
    }
    if (t >= tree.sinks()) {
      const int64_t begin = tree.sinks() +
                            (t - tree.sinks()) / geometry.near_block * geometry.near_block;
      for (int64_t j = begin; j <= t; ++j) {
        ++covered[t][j];
      }
    }
  }
  int64_t pairs = 0;
  for (const PairRun& run : tree.runs()) {
    EXPECT_EQ(run.first_pair, pairs);
    pairs += run.count;
    for (int64_t i = 0; i < run.count; ++i) {
      EXPECT_LE(run.key_begin + i * run.stride + run.key_rows, run.query_begin + i * run.stride);
      for (int64_t t = 0; t < run.query_rows; ++t) {
        for (int64_t j = 0; j < run.key_rows; ++j) {
          ++covered.at(run.query_begin + i * run.stride + t).at(run.key_begin + i * run.stride + j);
        }
      }
    }
  }
  EXPECT_EQ(pairs, tree.num_pairs());
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t j = 0; j < length; ++j) {
      ASSERT_EQ(covered[t][j], j <= t ? 1 : 0) << "query " << t << ", key " << j;
    }
  }
}

TEST(BlockTree, CoversEveryVisiblePairOnce) {
  for (const int64_t block : {1, 3, 8, 16}) {
    for (const int64_t sinks : {0, 1, 4}) {
      for (const int64_t length :
           {1, 2, 4, 5, 8, 9, 16, 17, 20, 21, 31, 32, 33, 63, 64, 65, 68, 69, 100, 128, 132}) {
        expect_exact_cover(length, {block, sinks});
      }
    }
  }
}

TEST(BlockTree, RefusesNonsense) {
  EXPECT_THROW(BlockTree(0, Geometry{}), c10::Error);
  EXPECT_THROW(BlockTree(8, Geometry{0, 4}), c10::Error);
  EXPECT_THROW(BlockTree(8, Geometry{4, -1}), c10::Error);
}

}  // namespace
}  // namespace drrl
