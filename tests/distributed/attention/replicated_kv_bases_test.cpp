// Processes that hold the same KV head, each with some of its query heads, against one process with
// all of them.
#include "distributed/attention/replicated_kv_bases.h"

#include <ATen/CPUGeneratorImpl.h>

#include "core/attention/far_bases.h"
#include "core/error.h"
#include "policy/attention/layer_plan.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/rank_policy.h"
#include "tests/support/io_support.h"
#include "tests/support/reference_llama.h"
#include "tests/support/tensor_parallel_fixture.h"

namespace drrl::test {
namespace {

constexpr int64_t kHeads = 7, kHeadDim = 16, kHidden = 24, kBatch = 2;
constexpr Geometry kGeometry{16, 2};
constexpr int64_t kLength = 2 + 7 * 16 + 5;  // eight blocks, the last one short

class ReplicatedKvBasesTest : public TensorParallelTest {
 protected:
  void SetUp() override {
    TensorParallelTest::SetUp();
    auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
    const auto random = [&](at::IntArrayRef shape) {
      return at::randn(shape, generator, at::TensorOptions(at::kFloat));
    };
    // A query head as much larger as its number: a mean over heads that did not count them rightly
    // would show.
    q_ = random({kBatch, kHeads, kLength, kHeadDim}) *
         (at::arange(kHeads).view({kHeads, 1, 1}) + 1);
    k_ = random({kBatch, 1, kLength, kHeadDim}) * at::linspace(2, 0.2, kHeadDim);
    v_ = random({kBatch, 1, kLength, kHeadDim}) * at::linspace(0.2, 2, kHeadDim);
    w_o_ = random({kHidden, kHeads * kHeadDim});
    start_ = std::get<0>(at::linalg_qr(random({1, 1, 2, kHeadDim, kHeadDim})));
    own_ = partition(kHeads, size_, rank_);
  }

  std::vector<BasisOptions> basis_options() const {
    return {{BasisOptions::kSolve, {}}, {2, start_}, {2, {}}};
  }

  // Ranks of one group by level, some of them exact.
  static std::vector<std::shared_ptr<RankPolicy>> policies() {
    RankTable table(1, 1, 3, {6, 4});
    table.at(0, 0, 1) = {16, 8};
    table.at(0, 0, 2) = {5, 16};
    return {make_fixed_policy(6, kHeadDim), make_table_policy(table, "table"),
            make_energy_policy(0.9, rank_buckets(at::kCPU, kHeadDim)), make_exact_policy()};
  }

  at::Tensor own_q() const { return q_.narrow(1, own_.begin, own_.count).contiguous(); }
  at::Tensor own_w_o() const {
    return w_o_.narrow(1, own_.begin * kHeadDim, own_.count * kHeadDim).contiguous();
  }
  int64_t summed(int64_t value) const {
    at::Tensor x = at::full({1}, value, at::kLong);
    tp_.all_reduce(x);
    return x.item<int64_t>();
  }

  at::Tensor q_, k_, v_, w_o_, start_;
  IndexRange own_{};
};

TEST_F(ReplicatedKvBasesTest, OutputsEqualOneProcessAndBasesAreBitEqual) {
  for (const BasisOptions& bases : basis_options()) {
    for (const auto& policy : policies()) {
      SCOPED_TRACE(c10::str(policy->describe(), ", ", bases.update_steps, " updates from ",
                            bases.start.defined() ? "a calibration" : "the first block"));
      LowRankController alone(policy, kGeometry, bases),
          shared(policy, kGeometry, bases, 0, GuardOptions{}, Group(), tp_);
      std::shared_ptr<LayerPlan> whole, plan;
      const at::Tensor expected = alone.attend(0, q_, k_, v_, w_o_, whole),
                       out = shared.attend(0, own_q(), k_, v_, own_w_o(), plan);
      EXPECT_LE(relative_error(out, expected.narrow(1, own_.begin, own_.count)), 1e-5);
      const AttentionStatistics one = alone.take_statistics(), mine = shared.take_statistics();
      EXPECT_EQ(mine.decisions, rank_ == 0 ? one.decisions : 0);
      EXPECT_EQ(mine.rank_qk, rank_ == 0 ? one.rank_qk : 0);
      if (policy->exact()) {
        EXPECT_EQ(mine.basis_bytes, 0);
        continue;
      }
      EXPECT_EQ(plan->lowrank->ranks, whole->lowrank->ranks);
      EXPECT_GT(mine.basis_bytes, 0);
      for (const Basis& basis : {plan->lowrank->scores, plan->lowrank->values}) {
        for (const at::Tensor& factor : {basis.left, basis.right}) {
          const at::Tensor bits = factor.contiguous().view(
              at::kInt);  // columns beyond a pair's rank may be no numbers
          at::Tensor first = bits.clone();
          tp_.broadcast(first);
          EXPECT_TRUE(first.equal(bits));
        }
      }
      if (!policy->needs_spectra()) {  // else each solves all spectra
        EXPECT_EQ(summed(mine.decompositions), one.decompositions);
        EXPECT_EQ(summed(mine.updates), one.updates);
        EXPECT_LT(mine.decompositions + mine.updates, one.decompositions + one.updates)
            << "worked on once";
      }
    }
  }
}

TEST_F(ReplicatedKvBasesTest, MorePartnersThanPairs) {
  const int64_t length = kGeometry.sink_tokens + kGeometry.near_block + 3;  // a single pair
  const auto cut = [&](const at::Tensor& x) { return x.narrow(2, 0, length).contiguous(); };
  for (const BasisOptions& bases : basis_options()) {
    LowRankController alone(make_fixed_policy(6, kHeadDim), kGeometry, bases),
        shared(make_fixed_policy(6, kHeadDim), kGeometry, bases, 0, GuardOptions{}, Group(), tp_);
    std::shared_ptr<LayerPlan> whole, plan;
    const at::Tensor expected = alone.attend(0, cut(q_), cut(k_), cut(v_), w_o_, whole),
                     out = shared.attend(0, cut(own_q()), cut(k_), cut(v_), own_w_o(), plan);
    EXPECT_LE(relative_error(out, expected.narrow(1, own_.begin, own_.count)), 1e-5);
  }
}

TEST_F(ReplicatedKvBasesTest, AGuardSeesAllHeads) {
  const GuardOptions guard{0.3, {4, 8, 12, 16}};
  LowRankController alone(make_fixed_policy(4, kHeadDim), kGeometry, {2, start_}, 0, guard),
      shared(make_fixed_policy(4, kHeadDim), kGeometry, {2, start_}, 0, guard, Group(), tp_);
  std::shared_ptr<LayerPlan> whole, plan;
  alone.attend(0, q_, k_, v_, w_o_, whole);
  shared.attend(0, own_q(), k_, v_, own_w_o(), plan);
  EXPECT_EQ(plan->lowrank->ranks, whole->lowrank->ranks);
  const AttentionStatistics mine = shared.take_statistics();
  const int64_t raises = alone.take_statistics().guard_raises;
  EXPECT_GT(raises, 0);
  EXPECT_EQ(mine.guard_raises, rank_ == 0 ? raises : 0);
}

TEST_F(ReplicatedKvBasesTest, GrowingSequences) {
  for (const BasisOptions& bases : basis_options()) {
    for (const auto& policy : policies()) {
      SCOPED_TRACE(c10::str(policy->describe(), ", ", bases.update_steps, " updates"));
      LowRankController alone(policy, kGeometry, bases),
          shared(policy, kGeometry, bases, 0, GuardOptions{}, Group(), tp_);
      const auto whole = alone.make_cache(1, kLength), cache = shared.make_cache(1, kLength);
      for (int64_t begin = 0; begin < kLength;) {
        const int64_t count = std::min<int64_t>(begin == 0 ? 71 : 9, kLength - begin);
        const auto part = [&](const at::Tensor& x) {
          return x.narrow(2, begin, count).contiguous();
        };
        const at::Tensor expected = alone.extend(0, part(q_), part(k_), part(v_), w_o_, *whole);
        const at::Tensor out = shared.extend(0, part(own_q()), part(k_), part(v_), own_w_o(),
                                             *cache);
        EXPECT_LE(relative_error(out, expected.narrow(1, own_.begin, own_.count)), 1e-5)
            << "from token " << begin;
        begin += count;
      }
    }
  }
}

TEST_F(ReplicatedKvBasesTest, DecisionsMustAgree) {
  LowRankController shared(make_fixed_policy(rank_ == size_ - 1 ? 6 : 4, kHeadDim), kGeometry, {},
                           0, GuardOptions{}, Group(), tp_);
  expect_error(ErrorKind::kCommunication,
               {"rank decisions", c10::str("world rank ", size_ == 2 ? 1 : size_ - 1)},
               [&] { shared.split(kLength); });
}

}  // namespace
}  // namespace drrl::test
