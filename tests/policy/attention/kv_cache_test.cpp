// The cache of one layer: what it holds. That it computes the right thing is
// tests/models/causal_lm/generate_test.cpp.
#include "core/attention/kv_cache.h"

#include <gtest/gtest.h>

#include "core/linalg/basis.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/rank_policy.h"

namespace drrl {
namespace {

constexpr int64_t kBatch = 2, kHeads = 4, kGroups = 2, kDim = 16, kBlock = 8, kSinks = 2;

// Bytes after each token of a sequence.
std::vector<int64_t> bytes_by_length(int64_t horizon, const std::shared_ptr<RankPolicy>& policy) {
  at::manual_seed(1);
  LowRankController controller(policy, {kBlock, kSinks});
  const auto cache = controller.make_cache(1, horizon);
  const at::Tensor w_o = at::randn({24, kHeads * kDim});
  std::vector<int64_t> result;
  for (int64_t t = 0; t < horizon; ++t) {
    controller.extend(0, at::randn({kBatch, kHeads, 1, kDim}),
                      at::randn({kBatch, kGroups, 1, kDim}), at::randn({kBatch, kGroups, 1, kDim}),
                      w_o, *cache);
    EXPECT_EQ(cache->length(), t + 1);
    result.push_back(cache->bytes());
  }
  return result;
}

// Floats of one (sequence, KV group): sinks, a block, the Gram and the sum of its queries in
// double.
constexpr int64_t kFixed = (kSinks + kBlock) * 2 * kDim + 2 * kDim * kDim +
                           2 * kDim * (kHeads / kGroups);
constexpr int64_t kFactor = kDim * std::min(kResidualColumns, kDim);
// Rows, the two bases that stay, and the residual factor.
int64_t node_floats(int64_t blocks, int64_t rank) {
  return (blocks * kBlock + kDim) * 2 * rank + kFactor;
}
// Keys and values, their weights, two projections d x d, the queries' Gram in double, and the
// residual factor.
int64_t exact_floats(int64_t blocks) {
  return blocks * kBlock * (2 * kDim + 1) + 2 * kDim * kDim + 2 * kDim * kDim + kFactor;
}
constexpr int64_t kBytes = kBatch * kGroups * 4;

TEST(KvCacheTest, HoldsExactlyWhatWillBeNeeded) {
  constexpr int64_t kRank = 6;
  const std::vector<int64_t> bytes = bytes_by_length(
      kSinks + 8 * kBlock, make_fixed_policy(kRank, kDim));  // eight blocks
  // Final nodes, in blocks, while block n is being filled, and those that a larger one will be made
  // of.
  const std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>> nodes = {
      {{}, {}},  {{}, {1}},  {{}, {2}},    {{}, {2, 1}},
      {{4}, {}}, {{4}, {1}}, {{4, 2}, {}}, {{4, 2, 1}, {}}};
  for (size_t n = 0; n < nodes.size(); ++n) {
    int64_t floats = kFixed;
    for (const int64_t blocks : nodes[n].first) {
      floats += node_floats(blocks, kRank);
    }
    for (const int64_t blocks : nodes[n].second) {
      floats += exact_floats(blocks);
    }
    for (int64_t row = 0; row < kBlock; ++row) {
      EXPECT_EQ(bytes[kSinks + n * kBlock + row], floats * kBytes)
          << "block " << n << ", row " << row;
    }
  }
}

TEST(KvCacheTest, FallsWithTheRank) {
  const int64_t horizon = kSinks + 33 * kBlock;
  const auto at_end = [&](const std::shared_ptr<RankPolicy>& policy) {
    return bytes_by_length(horizon, policy).back();
  };
  const int64_t full = at_end(make_exact_policy());
  EXPECT_EQ(full, horizon * 2 * kDim * kBytes);  // plain: no bases, no Grams
  int64_t last = full;
  for (const int64_t rank : {12, 8, 4, 1}) {
    const int64_t bytes = at_end(make_fixed_policy(rank, kDim));
    EXPECT_LT(bytes, last) << "rank " << rank;
    last = bytes;
  }
  EXPECT_LT(last, full / 5);  // a good part of it residual factors, which do not fall
}

TEST(KvCacheTest, HoldsNodesAtFullRankAsTheyAre) {
  class FullButCounted final : public RankPolicy {
    std::vector<Ranks> decide(const LayerObservation& o) override {
      return std::vector<Ranks>(static_cast<size_t>(o.items()), Ranks{kDim, kDim});
    }
    std::string describe() const override { return "full ranks"; }
  };
  const std::vector<int64_t> bytes = bytes_by_length(kSinks + 4 * kBlock,
                                                     std::make_shared<FullButCounted>());
  EXPECT_EQ(bytes[kSinks + kBlock], (kFixed + exact_floats(1) - 2 * kDim * kDim - kFactor) *
                                        kBytes);  // no projections, nothing dropped
  EXPECT_EQ(bytes.back(), (kFixed + 3 * kBlock * 2 * kDim) * kBytes);
}

// A token's scores of about 20 in bfloat16, against the softmax in double of the same inputs.
TEST(KvCacheTest, ScoresOfHalfPrecisionAreNotRounded) {
  constexpr int64_t kTokens = 32, kWide = 64, kColumns = 16;
  at::manual_seed(3);
  auto k = 0.1 * at::randn({1, 1, kTokens, kWide}), q = 0.1 * at::randn_like(k);
  k.select(3, 0).fill_(12.6);
  k.select(3, 0).add_(0.1 * at::randn({kTokens}));
  q.select(3, 0).fill_(12.6);
  const auto half = [](const at::Tensor& x) { return x.to(at::kBFloat16); };
  const auto hq = half(q), hk = half(k),
             hv = half(at::eye(kTokens, kWide).view({1, 1, kTokens, kWide}));
  LayerCache cache(BlockTree(kTokens, {kTokens, 0}));
  at::Tensor out;
  for (int64_t t = 0; t < kTokens; ++t) {
    const auto token = [&](const at::Tensor& x) { return x.narrow(2, t, 1); };
    out = cache.extend(token(hq), token(hk), token(hv), nullptr);
  }
  const auto weights = at::softmax(at::matmul(hq.select(2, kTokens - 1).to(at::kDouble),
                                              hk[0][0].to(at::kDouble).t()) /
                                       8,
                                   2)
                           .view({-1});
  EXPECT_LT(
      (out.view({-1}).narrow(0, 0, kColumns).to(at::kDouble) / weights.narrow(0, 0, kColumns) - 1)
          .pow(2)
          .mean()
          .sqrt()
          .item<double>(),
      5e-3);
}

TEST(KvCacheTest, RefusesOtherShapes) {
  LayerCache cache(BlockTree(10, {4, 1}));
  const auto x = [](int64_t heads, int64_t tokens) { return at::randn({1, heads, tokens, 8}); };
  cache.extend(x(2, 3), x(1, 3), x(1, 3), nullptr);
  EXPECT_THROW(cache.extend(x(3, 1), x(3, 1), x(3, 1), nullptr), c10::Error);
  EXPECT_THROW(cache.extend(x(2, 1), x(1, 2), x(1, 2), nullptr), c10::Error);
}

}  // namespace
}  // namespace drrl
