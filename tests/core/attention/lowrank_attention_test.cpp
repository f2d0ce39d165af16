#include "core/attention/lowrank_attention.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "core/attention/exact_attention.h"
#include "core/attention/flops.h"
#include "core/attention/reference.h"
#include "core/linalg/basis.h"
#include "core/linalg/gram.h"

namespace drrl {
namespace {

struct Case {
  int64_t batch, heads, groups, length, d;
  Geometry geometry;
  std::vector<Ranks> ranks;  // dealt out in turn over the items

  bool drops() const {
    return std::any_of(ranks.begin(), ranks.end(), [](const Ranks& r) { return r.drops(); });
  }
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << "B = " << c.batch << ", H = " << c.heads << ", G = " << c.groups << ", L = " << c.length
      << ", d = " << c.d << ", block = " << c.geometry.near_block
      << ", sinks = " << c.geometry.sink_tokens << ", ranks";
  for (const Ranks& r : c.ranks) {
    out << " (" << r.qk << ", " << r.v << ", drop " << r.drop << ")";
  }
  return out;
}

struct Inputs {
  at::Tensor q, k, v, grad;
};

Inputs make_inputs(const Case& c, at::ScalarType dtype) {
  at::manual_seed(11);
  const auto options = at::TensorOptions().dtype(at::kDouble);
  // A decaying spectrum, so that low rank is an approximation and not noise.
  const auto decay = at::diag(at::logspace(0, -1.5, c.d, 10.0, options));
  const auto mixed = at::matmul(decay, at::randn({c.d, c.d}, options));
  const auto mix = mixed * (std::sqrt(static_cast<double>(c.d)) /
                            mixed.norm().item<double>());  // entries of variance 1
  const auto make = [&](int64_t heads) {
    return at::matmul(at::randn({c.batch, heads, c.length, c.d}, options), mix).to(dtype);
  };
  return {make(c.heads), make(c.groups), make(c.groups),
          at::randn({c.batch, c.heads, c.length, c.d}, options).to(dtype)};
}

c10::intrusive_ptr<LowRankPlan> make_plan(const Case& c, const Inputs& in) {
  const BlockTree tree(c.length, c.geometry);
  std::vector<Ranks> ranks;
  Basis scores, values;
  if (tree.num_pairs() > 0) {
    const PairGrams grams = pair_grams(in.q, in.k, in.v, tree);
    at::manual_seed(12);
    const auto w_o = at::randn({c.heads * c.d, c.heads * c.d}, at::kDouble);
    const auto g_o = output_gram(w_o, c.groups, c.d)
                         .unsqueeze(1)
                         .expand({c.batch, c.groups, tree.num_pairs(), c.d, c.d});
    scores = solve_basis(grams.queries.flatten(0, 2), grams.keys.flatten(0, 2));
    values = solve_basis(grams.values.flatten(0, 2), g_o.reshape({-1, c.d, c.d}));
    for (int64_t i = 0; i < c.batch * c.groups * tree.num_pairs(); ++i) {
      ranks.push_back(c.ranks[i % c.ranks.size()]);
    }
  }
  at::Tensor residual;
  if (tree.num_pairs() > 0) {  // any factor: that it is the right one is the basis's test
    residual = at::randn(
                   {static_cast<int64_t>(ranks.size()), c.d, std::min(kResidualColumns, c.d)}) *
               (0.3 / static_cast<double>(c.d));
  }
  return c10::make_intrusive<LowRankPlan>(tree, ranks, scores, values, residual);
}

double relative(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b.to(at::kDouble)).norm() / (b.to(at::kDouble).norm() + 1e-300))
      .item<double>();
}

constexpr float kNoGate = Ranks{0, 0}.gate;

class Operator : public ::testing::TestWithParam<Case> {};

const Case kCases[] = {
    {1, 6, 3, 200, 32, {32, 4}, {{16, 16}}},  // grouped heads, short last block
    {2, 4, 4, 132, 32, {32, 4}, {{8, 8}}},    // batch, one head a group, L = s + 4 B
    {1, 2, 1, 33, 16, {32, 0}, {{4, 4}}},     // L = B + 1, no sinks
    {1, 2, 1, 38, 16, {32, 4}, {{4, 8}}},     // one short pair
    {1, 9, 3, 300, 32, {32, 4}, {{16, 8}}},   // r > r_v
    {1, 9, 3, 300, 32, {32, 4}, {{8, 16}}},   // r < r_v
    {1, 6, 3, 300, 32, {16, 1}, {{8, 8}, {16, 32}, {32, 16}, {32, 32}, {4, 12}}},  // every item its
                                                                                   // own ranks
    {2, 6, 2, 260, 16, {64, 4}, {{8, 16}}},  // scores low, values exact
    {1, 6, 2, 260, 16, {64, 4}, {{16, 8}}},  // scores exact, values low
    {2,
     6,
     3,
     700,
     48,
     {128, 4},
     {{16, 32}, {48, 16}, {32, 48}, {16, 16}, {48, 48}}},  // the fused kernel's widths, several
                                                           // query blocks a block
    {1, 2, 1, 1300, 32, {160, 0}, {{16, 16}, {32, 16}, {16, 32}}},  // and several key chunks a pair
    {2,
     6,
     3,
     300,
     32,
     {32, 4},
     {{8, 8, 0.02F},
      {4, 12, 0.005F},
      {32, 8, 0.01F},
      {8, 8, 0},
      {32, 32, 0},
      {8, 32}}},  // some entries exact, all, none
    {2,
     6,
     3,
     700,
     48,
     {128, 4},
     {{16, 32, 0.02F},
      {48, 16, 0.01F},
      {16, 16, 0.003F},
      {16, 48, 0},
      {48, 48},
      {16, 16}}},  // the same in the fused kernel
    {1, 6, 2, 640, 32, {64, 0}, {{16, 16, 0.01F}}},
    {1, 2, 1, 2048, 16, {1024, 0}, {{8, 8, 0.01F}}},  // a matrix of scores in several slices
    {1,
     6,
     3,
     700,
     48,
     {128, 4},
     {{16, 32, kNoGate, 0.3F},
      {48, 48, kNoGate, 0.2F},
      {16, 16, 0.02F, 0.3F},
      {32, 48}}},                                               // some tiles dropped
    {1, 4, 2, 461, 32, {64, 0}, {{8, 8, kNoGate, 0.3F}}},       // not in the fused kernel
    {2, 2, 1, 1300, 32, {256, 3}, {{16, 16, kNoGate, 0.03F}}},  // several pieces of a block
    {1, 2, 1, 1100, 16, {64, 1}, {{16, 16, kNoGate, 0.5F}, {16, 16, 0, 1e-9F}}},  // nearly all,
                                                                                  // none
};

TEST_P(Operator, ForwardAndGradientsEqualTheReference) {
  const Case& c = GetParam();
  // The reference in double, the operator in double (its algebra) and in float (its arithmetic).
  const Inputs in = make_inputs(c, at::kDouble);
  const auto plan = make_plan(c, in);
  const auto run = [&](at::ScalarType dtype, bool reference) {
    std::vector<at::Tensor> x;
    for (const at::Tensor& t : {in.q, in.k, in.v}) {
      x.push_back(t.to(dtype).detach().clone().requires_grad_(true));
    }
    const auto out = reference ? reference::lowrank_attention(x[0], x[1], x[2], *plan)
                               : lowrank_attention(x[0], x[1], x[2], plan);
    auto grads = torch::autograd::grad({out}, x, {in.grad.to(dtype)});
    grads.insert(grads.begin(), out.detach());
    return grads;
  };
  const auto expected = run(at::kDouble, true);
  const auto exact_arithmetic = run(at::kDouble, false);
  const auto single = run(at::kFloat, false);
  const char* names[] = {"out", "dq", "dk", "dv"};
  for (int i = 0; i < 4; ++i) {
    EXPECT_LT(relative(exact_arithmetic[i], expected[i]), 1e-10) << names[i];
    EXPECT_LT(relative(single[i], expected[i]), 1e-5) << names[i];
  }
}

// The kernel in float and the composed operator in double decide alike.
TEST_P(Operator, DropsTheSameTilesEverywhere) {
  const Case& c = GetParam();
  if (!c.drops()) {
    GTEST_SKIP() << "nothing is dropped";
  }
  const Inputs in = make_inputs(c, at::kDouble);
  const auto plan = make_plan(c, in);
  FarServed wide, single;
  lowrank_attention(in.q, in.k, in.v, plan, &wide);
  lowrank_attention(in.q.to(at::kFloat), in.k.to(at::kFloat), in.v.to(at::kFloat), plan, &single);
  ASSERT_TRUE(wide.kept_from.defined() && single.kept_from.defined());
  const auto clear = [](const at::Tensor& x) {  // pairs that drop nothing
    return x.masked_fill(x == FarServed::kNoTile, 0);
  };
  EXPECT_TRUE(clear(wide.kept_from).equal(clear(single.kept_from)));
  const auto dropped = (wide.kept_from == kTileRows).sum().item<int64_t>(),
             kept = (wide.kept_from < kTileRows).sum().item<int64_t>();
  EXPECT_GT(dropped, 0);
  EXPECT_GT(kept, 0);
  const double exact = exact_attention_flops(c.batch, c.heads, c.length, c.d, true);
  const auto flops = [&](const FarServed& served) {
    return lowrank_attention_flops(*plan, c.batch, c.heads, c.groups, c.d, 0, true, served).total();
  };
  EXPECT_LT(flops(wide), flops({wide.exact, {}}));
  EXPECT_NEAR(flops(wide), flops(single), 1e-6 * exact);
}

TEST_P(Operator, Bfloat16StaysNearTheReference) {
  const Case& c = GetParam();
  if (c.drops()) {
    GTEST_SKIP() << "in bfloat16 other tiles are dropped";
  }
  Inputs in = make_inputs(c, at::kBFloat16);
  const Inputs wide{in.q.to(at::kDouble), in.k.to(at::kDouble), in.v.to(at::kDouble),
                    in.grad.to(at::kDouble)};
  const auto plan = make_plan(c, wide);
  const auto run = [&](const Inputs& from, bool reference) {
    std::vector<at::Tensor> x;
    for (const at::Tensor& t : {from.q, from.k, from.v}) {
      x.push_back(t.detach().clone().requires_grad_(true));
    }
    const auto out = reference ? reference::lowrank_attention(x[0], x[1], x[2], *plan)
                               : lowrank_attention(x[0], x[1], x[2], plan);
    auto grads = torch::autograd::grad({out}, x, {from.grad});
    grads.insert(grads.begin(), out.detach());
    return grads;
  };
  const auto expected = run(wide, true);
  const auto got = run(in, false);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(got[i].scalar_type(), at::kBFloat16);
    EXPECT_LT(relative(got[i], expected[i]), 4e-2) << i;
  }
}

// Independent of autograd: central differences of the operator itself, in double.
TEST_P(Operator, GradientsEqualFiniteDifferences) {
  const Case& c = GetParam();
  const Inputs in = make_inputs(c, at::kDouble);
  if (c.drops() || std::any_of(c.ranks.begin(), c.ranks.end(),
                               [&](const Ranks& r) { return r.gated(c.d) && r.gate > 0; })) {
    GTEST_SKIP()
        << "which entries are exact is constant for gradients, but differs between differences";
  }
  const auto plan = make_plan(c, in);
  plan->residual.reset();  // it is held constant in the backward, which differences would not
  std::vector<at::Tensor> x = {in.q.clone(), in.k.clone(), in.v.clone()};
  std::vector<at::Tensor> tracked;
  for (const at::Tensor& t : x) {
    tracked.push_back(t.detach().clone().requires_grad_(true));
  }
  const auto grads = torch::autograd::grad(
      {lowrank_attention(tracked[0], tracked[1], tracked[2], plan)}, tracked, {in.grad});
  const double step = 1e-5;
  for (int i = 0; i < 3; ++i) {
    const auto direction = at::randn_like(x[i]);
    const auto at_offset = [&](double offset) {
      auto y = x;
      y[i] = x[i] + direction * offset;
      at::NoGradGuard no_grad;
      return (lowrank_attention(y[0], y[1], y[2], plan) * in.grad).sum().item<double>();
    };
    const double numeric = (at_offset(step) - at_offset(-step)) / (2 * step);
    const double analytic = (grads[i] * direction).sum().item<double>();
    EXPECT_NEAR(
        numeric, analytic,
        1e-6 * std::max(1.0, grads[i].norm().item<double>() * direction.norm().item<double>() / 10))
        << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Operator, ::testing::ValuesIn(kCases));

// All far entries exact, eight of them with scores of about 20 in each row: a score that is rounded
// to bfloat16 makes its weight wrong by up to 6 %.
TEST(LowRankAttention, GatedScoresOfHalfPrecisionAreNotRounded) {
  constexpr int64_t kLength = 256, kBlock = 128, kDim = 64, kHeavy = 8;
  at::manual_seed(21);
  const auto options = at::TensorOptions().dtype(at::kDouble);
  auto k = 0.3 * at::randn({1, 1, kLength, kDim}, options), v = at::zeros_like(k);
  auto q = 0.3 * at::randn_like(k);
  q.select(3, 0).fill_(12.6);
  k.select(3, 0).zero_();
  for (int64_t i = 0; i < kHeavy;
       ++i) {  // keys far from each other, and each with a column of the output for its weight
    k[0][0][16 * i][0] = 12.6 + 0.08 * static_cast<double>(i);
    v[0][0][16 * i][i] = 1;
  }
  const auto half = [](const at::Tensor& x) { return x.to(at::kBFloat16).requires_grad_(true); };
  const auto hq = half(q), hk = half(k), hv = half(v);
  const BlockTree tree(kLength, {kBlock, 0});
  const PairGrams grams = pair_grams(q, k, v, tree);
  const auto bases = solve_basis(grams.queries.flatten(0, 2), grams.keys.flatten(0, 2));
  const auto out = lowrank_attention(
      hq, hk, hv,
      c10::make_intrusive<LowRankPlan>(tree, std::vector<Ranks>{{16, 16, 0}}, bases, bases));

  const auto wide = [](const at::Tensor& x) {
    return x.detach().to(at::kDouble).requires_grad_(true);
  };
  const auto wq = wide(hq), wk = wide(hk), wv = wide(hv);
  const auto weights = at::softmax(at::matmul(wq, wk.transpose(2, 3)) / 8 +
                                       at::full({kLength, kLength}, -INFINITY, options).triu(1),
                                   3);
  const auto expected = at::matmul(weights, wv);
  const auto far = [](const at::Tensor& x) {
    return x.detach().narrow(2, kBlock, kBlock).narrow(3, 0, kHeavy).to(at::kDouble);
  };
  ASSERT_GT(far(expected).min().item<double>(), 0.02);
  EXPECT_LT((far(out) / far(expected) - 1).pow(2).mean().sqrt().item<double>(), 5e-3);

  auto towards = at::randn(q.sizes(), options);
  towards.narrow(2, 0, kBlock).zero_();
  const auto got = torch::autograd::grad({out}, {hq, hk, hv}, {towards.to(at::kBFloat16)});
  const auto right = torch::autograd::grad({expected}, {wq, wk, wv},
                                           {towards.to(at::kBFloat16).to(at::kDouble)});
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_LT(relative(got[i], right[i]), i == 0 ? 2.5e-2 : 1e-2) << i;
  }
}

TEST(KernelWidth, IsTheNextThatKernelsTake) {
  EXPECT_EQ(kernel_width(20), 24);
  EXPECT_EQ(kernel_width(32), 32);
  EXPECT_EQ(kernel_width(1), 8);
}

TEST(LowRankAttention, FullRanksAreExactAttention) {
  const Case c{2, 6, 3, 150, 32, {32, 4}, {{32, 32}}};
  const Inputs in = make_inputs(c, at::kFloat);
  const auto plan = make_plan(c, in);
  EXPECT_TRUE(
      at::equal(lowrank_attention(in.q, in.k, in.v, plan), exact_attention(in.q, in.k, in.v)));
  EXPECT_LT(relative(exact_attention(in.q, in.k, in.v),
                     reference::exact_attention(in.q.to(at::kDouble), in.k.to(at::kDouble),
                                                in.v.to(at::kDouble))),
            1e-5);
}

TEST(LowRankAttention, ASequenceWithoutFarTokensIsExact) {
  for (const int64_t length : {1, 3, 4, 20, 36}) {
    const Case c{1, 4, 2, length, 16, {32, 4}, {{8, 8}}};
    const Inputs in = make_inputs(c, at::kFloat);
    EXPECT_TRUE(at::equal(lowrank_attention(in.q, in.k, in.v, make_plan(c, in)),
                          exact_attention(in.q, in.k, in.v)))
        << length;
  }
}

TEST(LowRankAttention,
     NearlyFullRankIsNearlyExact) {  // independent of the reference's idea of the low-rank part
  const Case c{1, 4, 2, 300, 32, {32, 4}, {{31, 31}}};
  const Inputs in = make_inputs(c, at::kDouble);
  const auto plan = make_plan(c, in);
  plan->residual.reset();
  EXPECT_LT(relative(lowrank_attention(in.q, in.k, in.v, plan),
                     reference::exact_attention(in.q, in.k, in.v)),
            2e-2);
}

TEST(LowRankAttention, RefusesWhatDoesNotFit) {
  const Case c{1, 4, 2, 100, 16, {32, 4}, {{8, 8}}};
  const Inputs in = make_inputs(c, at::kFloat);
  const auto plan = make_plan(c, in);
  EXPECT_THROW(
      lowrank_attention(in.q.narrow(2, 0, 99), in.k.narrow(2, 0, 99), in.v.narrow(2, 0, 99), plan),
      c10::Error);
  EXPECT_THROW(lowrank_attention(in.q.narrow(1, 0, 3), in.k, in.v, plan), c10::Error);
  auto bad = c10::make_intrusive<LowRankPlan>(plan->tree, plan->ranks, plan->scores, plan->values);
  bad->ranks[0].qk = 17;
  EXPECT_THROW(lowrank_attention(in.q, in.k, in.v, bad), c10::Error);
  bad->ranks[0].qk = 8;
  bad->scores = {};
  EXPECT_THROW(lowrank_attention(in.q, in.k, in.v, bad), c10::Error);
  bad->ranks.pop_back();
  EXPECT_THROW(lowrank_attention(in.q, in.k, in.v, bad), c10::Error);
}

// Changing tokens after t must leave bases and outputs up to t bit-equal.
TEST(LowRankAttention, IsStrictlyCausal) {
  const Case c{1, 6, 3, 300, 32, {32, 4}, {{16, 16}, {8, 16}}};
  const Inputs in = make_inputs(c, at::kFloat);
  const auto before = lowrank_attention(in.q, in.k, in.v, make_plan(c, in));
  for (const int64_t t : {5, 36, 67, 131, 260, 299}) {
    Inputs changed{in.q.clone(), in.k.clone(), in.v.clone(), in.grad};
    for (at::Tensor* x : {&changed.q, &changed.k, &changed.v}) {
      x->narrow(2, t, c.length - t).mul_(-3.0f).add_(1.0f);
    }
    const auto after = lowrank_attention(changed.q, changed.k, changed.v, make_plan(c, changed));
    EXPECT_TRUE(at::equal(before.narrow(2, 0, t), after.narrow(2, 0, t)))
        << "a token from " << t << " on changed an earlier output";
    EXPECT_FALSE(at::equal(before, after));
  }
}

TEST(Cost, FullRankCostsExactAttentionAndLowRankLess) {
  const Case full{1, 9, 3, 2048, 64, {256, 4}, {{64, 64}}};
  const BlockTree tree(full.length, full.geometry);
  const auto plan = [&](Ranks r) {
    return LowRankPlan(tree, std::vector<Ranks>(3 * tree.num_pairs(), r), {}, {});
  };
  const double exact = exact_attention_flops(1, 9, 2048, 64, false);
  EXPECT_EQ(exact, 4.0 * 9 * 64 * 2048 * 2049 / 2);
  EXPECT_EQ(lowrank_attention_flops(plan({64, 64}), 1, 9, 3, 64, 0, false).total(), exact);
  const AttentionFlops half = lowrank_attention_flops(plan({32, 32}), 1, 9, 3, 64, 0, false);
  // Near, sinks and far pairs tile the causal triangle: at full width their operations would add up
  // to exact attention's.
  EXPECT_NEAR(half.near + half.sinks + 2 * half.far, exact, 1e-6 * exact);
  EXPECT_LT(half.total(), exact);
}

}  // namespace
}  // namespace drrl
