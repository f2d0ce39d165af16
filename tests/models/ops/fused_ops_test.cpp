// The fused operators: both implementations against each other, gradients against finite
// differences in double, the fused loss against log_softmax.
#include "models/ops/fused_ops.h"

#include <gtest/gtest.h>

#include "models/causal_lm/tensor_parallel.h"
#include "models/ops/cpu_loops.h"
#include "models/ops/cross_entropy.h"
#include "tests/support/reference_llama.h"

namespace drrl::test {
namespace {

using Tensors = std::vector<at::Tensor>;
constexpr auto kLoops = Implementation::kLoops;
constexpr auto kComposed = Implementation::kComposed;

at::Tensor random(at::IntArrayRef shape, at::ScalarType dtype = at::kDouble, double scale = 1.0) {
  static auto generator = at::make_generator<at::CPUGeneratorImpl>(11);
  return at::empty(shape, at::kDouble).normal_(0.0, scale, generator).to(dtype);
}

// Gradients of sum(weights * f(inputs)) that autograd (or in-place accumulation) left in .grad,
// against central differences.
void expect_finite_differences(const std::function<Tensors(const Tensors&)>& f, Tensors inputs) {
  Tensors outputs_weights;
  const auto value = [&] {
    at::Tensor total = at::zeros({}, at::kDouble);
    const Tensors outputs = f(inputs);
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (outputs_weights.size() <= i) {
        outputs_weights.push_back(random(outputs[i].sizes()));
      }
      total = total + (outputs[i] * outputs_weights[i]).sum();
    }
    return total;
  };
  for (at::Tensor& input : inputs) {
    input.requires_grad_(true);
  }
  value().backward();
  at::NoGradGuard no_grad;
  for (size_t i = 0; i < inputs.size(); ++i) {
    at::Tensor& input = inputs[i];
    ASSERT_TRUE(input.grad().defined()) << "input " << i;
    at::Tensor numeric = at::empty_like(input);
    double* x = input.data_ptr<double>();
    for (int64_t j = 0; j < input.numel(); ++j) {
      constexpr double kStep = 1e-5;
      const double saved = x[j];
      x[j] = saved + kStep;
      const double above = value().item<double>();
      x[j] = saved - kStep;
      const double below = value().item<double>();
      x[j] = saved;
      numeric.data_ptr<double>()[j] = (above - below) / (2.0 * kStep);
    }
    EXPECT_LE(relative_error(input.grad(), numeric), 1e-7) << "input " << i;
  }
}

double tolerance(at::ScalarType dtype) {
  return dtype == at::kDouble ? 1e-13 : dtype == at::kFloat ? 1e-6 : 5e-3;
}

class Operators : public testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override {
    if (!loops::supported()) {
      GTEST_SKIP() << "this processor has no AVX2";
    }
  }
  at::ScalarType dtype() const { return GetParam(); }
  at::ScalarType wide() const { return dtype() == at::kDouble ? at::kDouble : at::kFloat; }
  void expect_same(const at::Tensor& loops, const at::Tensor& composed) const {
    EXPECT_EQ(loops.scalar_type(), composed.scalar_type());
    EXPECT_EQ(loops.sizes(), composed.sizes());
    EXPECT_LE(relative_error(loops, composed), tolerance(dtype()));
  }
};

TEST_P(Operators, NormIsTheSameInBothImplementations) {
  for (const auto& [rows, n] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 3}, {5, 7}, {70, 33}, {1000, 576}, {0, 8}}) {
    const at::Tensor x = random({rows, n}, dtype(), 2.0);
    const at::Tensor weight = random({n}, wide());
    const auto a = raw::rms_norm_forward(x, weight, 1e-5, kLoops);
    const auto b = raw::rms_norm_forward(x, weight, 1e-5, kComposed);
    expect_same(a.y, b.y);
    expect_same(a.rstd, b.rstd);
    const at::Tensor dy = random({rows, n}, dtype());
    for (const at::Tensor& dh : {at::Tensor(), random({rows, n}, dtype())}) {
      const auto da = raw::rms_norm_backward(dy, dh, x, weight, b.rstd, kLoops);
      const auto db = raw::rms_norm_backward(dy, dh, x, weight, b.rstd, kComposed);
      expect_same(da.x, db.x);
      expect_same(da.weight, db.weight);
    }
  }
}

TEST_P(Operators, RopeIsTheSameInBothImplementations) {
  const int64_t batch = 2, length = 37, heads = 6, groups = 3, d = 10;
  const at::Tensor angle = random({length, d / 2}, at::kFloat, 10.0);
  const at::Tensor cos = angle.cos();
  const at::Tensor sin = angle.sin();
  const at::Tensor qkv = random({batch * length, (heads + 2 * groups) * d}, dtype());
  const auto [qa, ka, va] = raw::rope_split_forward(qkv, cos, sin, batch, heads, groups, kLoops);
  const auto [qb, kb, vb] = raw::rope_split_forward(qkv, cos, sin, batch, heads, groups, kComposed);
  expect_same(qa, qb);
  expect_same(ka, kb);
  EXPECT_TRUE(va.equal(vb));
  EXPECT_TRUE(qa.is_contiguous() && ka.is_contiguous() && va.is_contiguous());
  // Gradients come with any strides: flash attention's are [B, L, H, d] in memory, an expanded one
  // has stride 0.
  const at::Tensor dq = random({batch, length, heads, d}, dtype()).transpose(1, 2);
  const at::Tensor dk = random({batch, groups, d, length}, dtype()).transpose(2, 3);
  const at::Tensor dv = random({batch, 1, length, d}, dtype()).expand({batch, groups, length, d});
  expect_same(raw::rope_split_backward(dq, dk, dv, cos, sin, kLoops),
              raw::rope_split_backward(dq, dk, dv, cos, sin, kComposed));
}

TEST_P(Operators, SwigluIsTheSameInBothImplementations) {
  for (const int64_t n : {1, 7, 8, 1536}) {
    at::Tensor gate_up = random({65, 2 * n}, dtype(), 4.0);
    gate_up[0][0] = 200.0;  // where exp would overflow or vanish
    gate_up[1][0] = -200.0;
    gate_up[2][0] = -80.0;
    const at::Tensor dy = random({65, n}, dtype());
    expect_same(raw::swiglu_forward(gate_up, kLoops), raw::swiglu_forward(gate_up, kComposed));
    const auto a = raw::swiglu_backward(gate_up, dy, kLoops);
    const auto b = raw::swiglu_backward(gate_up, dy, kComposed);
    expect_same(a.gate_up, b.gate_up);
    expect_same(a.y, b.y);
    EXPECT_TRUE(at::isfinite(a.gate_up).all().item<bool>());
  }
}

TEST_P(Operators, ExponentialsAreTheSameInBothImplementations) {
  for (const int64_t n : {1, 13, 5000}) {
    at::Tensor logits = random({9, n}, dtype(), 10.0);
    logits[3] = logits[3] - 1000.0;
    logits[4][0] = 3000.0;
    at::Tensor
        a = at::zeros({9, n + 3}, logits.options()).narrow(1, 0, n).copy_(logits);  // padded rows
    at::Tensor b = logits.clone();
    const auto [max_a, sum_a] = raw::exp_rows_(a, kLoops);
    const auto [max_b, sum_b] = raw::exp_rows_(b, kComposed);
    expect_same(a, b);
    EXPECT_TRUE(max_a.equal(max_b));
    EXPECT_TRUE(at::allclose(sum_a, sum_b, 1e-5));
    const at::Tensor factor = random({9}, wide());
    raw::scale_rows_(a, factor, kLoops);
    raw::scale_rows_(b, factor, kComposed);
    expect_same(a, b);
  }
}

TEST_P(Operators, ScatterAddIsTheSameInBothImplementations) {
  const at::Tensor ids = at::tensor({5, 3, 9, 3, 0, 3, 12, 8},
                                    at::kLong);  // the table holds 3 to 8
  const at::Tensor x = random({8, 300}, dtype());
  at::Tensor a = random({6, 300}, wide());
  at::Tensor b = a.clone();
  raw::scatter_add_(a, ids, x, 3, kLoops);
  raw::scatter_add_(b, ids, x, 3, kComposed);
  expect_same(a, b);
  EXPECT_LE(relative_error(a[1], b[1]), 1e-6);
}

INSTANTIATE_TEST_SUITE_P(Types, Operators, testing::Values(at::kFloat, at::kDouble, at::kBFloat16),
                         [](const auto& test) { return c10::toString(test.param); });

TEST(OperatorsTest, NotANumberStaysOne) {
  at::Tensor logits = random({2, 40}, at::kFloat);
  logits[1][17] = std::nanf("");
  const at::Tensor sum = raw::exp_rows_(logits, implementation_for(logits)).second;
  EXPECT_TRUE(std::isfinite(sum[0].item<float>()));
  EXPECT_TRUE(std::isnan(sum[1].item<float>()));
  at::Tensor bf16 = at::full({1, 2}, std::nanf(""), at::kBFloat16);
  EXPECT_TRUE(at::isnan(raw::swiglu_forward(bf16, implementation_for(bf16))).all().item<bool>());
}

TEST(OperatorsTest, NormGradients) {
  expect_finite_differences(
      [](const Tensors& in) {
        const auto [h, y] = rms_norm(in[0] * 1.0, in[1], 1e-3);
        return Tensors{h, y};
      },
      {random({5, 9}), random({9})});
}

TEST(OperatorsTest, LayerNormGradients) {
  expect_finite_differences(
      [](const Tensors& in) {
        const auto [h, y] = layer_norm(in[0] * 1.0, in[1], in[2], 1e-5);
        return Tensors{h, y};
      },
      {random({5, 6}), random({6}), random({6})});
}

TEST(OperatorsTest, PositionGradients) {
  expect_finite_differences(
      [](const Tensors& in) {
        return Tensors{add_positions(in[0] * 1.0, in[1], at::tensor({2, 3, 5, 6}, at::kLong), 2)};
      },
      {random({8, 3}), random({7, 3})});
}

TEST(OperatorsTest, RopeGradients) {
  const at::Tensor angle = random({7, 3}, at::kFloat, 10.0);
  expect_finite_differences(
      [&](const Tensors& in) {
        const auto [q, k, v] = rope_split(in[0] * 1.0, angle.cos(), angle.sin(), 2, 4, 2);
        return Tensors{q, k, v};
      },
      {random({14, 48})});
}

TEST(OperatorsTest, LinearGradients) {
  expect_finite_differences(
      [](const Tensors& in) {
        return Tensors{column_parallel_linear(in[0] * 1.0, in[1], in[2], Group())};
      },
      {random({5, 4}), random({6, 4}), random({6})});
  expect_finite_differences(
      [](const Tensors& in) {
        return Tensors{row_parallel_linear(in[0] * 1.0, in[1], in[2], in[3] * 1.0, Group())};
      },
      {random({5, 4}), random({6, 4}), random({6}), random({5, 6})});
  expect_finite_differences(
      [](const Tensors& in) {
        return Tensors{row_parallel_linear(in[0] * 1.0, in[1], in[2], in[3] * 1.0, Group(),
                                           Activation::kSwiglu)};
      },
      {random({5, 8}), random({6, 4}), random({6}), random({5, 6})});
  for (const Activation activation : {Activation::kGelu, Activation::kGeluTanh}) {
    expect_finite_differences(
        [&](const Tensors& in) {
          return Tensors{
              row_parallel_linear(in[0] * 1.0, in[1], in[2], in[3] * 1.0, Group(), activation)};
        },
        {random({5, 4}), random({6, 4}), random({6}), random({5, 6})});
  }
}

TEST(OperatorsTest, EmbeddingGradients) {
  const at::Tensor tokens = at::tensor({2, 0, 2, 4}, at::kLong);
  expect_finite_differences(
      [&](const Tensors& in) {
        return Tensors{vocabulary_parallel_embedding(tokens, in[0], 0, at::kDouble, Group())};
      },
      {random({5, 3})});
}

TEST(OperatorsTest, LossGradients) {
  const at::Tensor labels = at::tensor({3, 0, -100, 10, 3}, at::kLong);
  expect_finite_differences(
      [&](const Tensors& in) {
        return Tensors{fused_linear_cross_entropy(in[0] * 1.0, in[1], labels, 0, 1.0, 2, Group())};
      },
      {random({5, 4}), random({11, 4})});
}

struct LossCase {
  const char* name;
  int64_t tokens, chunk;
  double ignored;  // share
};

class FusedLoss : public testing::TestWithParam<LossCase> {};

TEST_P(FusedLoss, EqualsLogSoftmax) {
  const auto& [name, tokens, chunk, ignored] = GetParam();
  const int64_t vocabulary = 131, hidden = 24;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor labels = at::randint(vocabulary, {tokens}, at::kLong)
                                  .masked_fill_(at::rand({tokens}) < ignored, kIgnoredLabel);
    const at::Tensor x = random({tokens, hidden}, dtype).requires_grad_(true);
    const at::Tensor weight = random({vocabulary, hidden}, wide).requires_grad_(true);
    const at::Tensor x_exact = x.detach().to(at::kDouble).requires_grad_(true);
    const at::Tensor w_exact = weight.detach().to(dtype).to(at::kDouble).requires_grad_(true);
    const at::Tensor expected = reference_nll(at::matmul(x_exact, w_exact.t()), labels);
    (3.0 * 0.5 * expected.sum()).backward();

    weight.mutable_grad() = at::ones_like(weight);  // something is there already
    const at::Tensor loss = fused_linear_cross_entropy(x, weight, labels, 0, 0.5, chunk, Group());
    (3.0 * loss).backward();
    const double close = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-6 : 2e-2;
    EXPECT_LE(relative_error(loss, expected.sum()), close) << dtype;
    EXPECT_LE(relative_error(x.grad(), x_exact.grad()), close) << dtype;
    EXPECT_LE((weight.grad() - 1.0 - w_exact.grad()).norm().item<double>(),
              close * (w_exact.grad().norm().item<double>() + 1.0))
        << dtype;
    const at::Tensor rows = linear_cross_entropy_rows(x, weight, labels, 0, chunk, Group());
    EXPECT_LE((rows - expected).abs().max().item<double>(),
              10 * close * (1.0 + expected.abs().max().item<double>()))
        << dtype;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, FusedLoss,
                         testing::Values(LossCase{"one_chunk", 20, 64, 0.0},
                                         LossCase{"uneven_chunks", 23, 7, 0.3},
                                         LossCase{"single_rows", 5, 1, 0.2},
                                         LossCase{"all_ignored", 6, 4, 1.1}),
                         [](const auto& test) { return test.param.name; });

TEST(FusedLossTest, SurvivesHugeLogits) {
  const at::Tensor x = (random({4, 8}, at::kFloat) * 100).requires_grad_(true);
  const at::Tensor weight = (random({50, 8}, at::kFloat) * 100).requires_grad_(true);
  const at::Tensor labels = at::tensor({1, 2, 3, 49}, at::kLong);
  const at::Tensor loss = fused_linear_cross_entropy(x, weight, labels, 0, 1.0, 3, Group());
  loss.backward();
  EXPECT_LE(relative_error(loss, reference_nll(at::matmul(x, weight.t()).detach(), labels).sum()),
            1e-6);
  EXPECT_TRUE(at::isfinite(x.grad()).all().item<bool>());
}

TEST(FusedLossTest, RunsBackwardOnce) {
  const at::Tensor x = random({4, 8}).requires_grad_(true);
  const at::Tensor weight = random({50, 8}).requires_grad_(true);
  const at::Tensor loss = fused_linear_cross_entropy(
      x, weight, at::tensor({1, 2, 3, 49}, at::kLong), 0, 1.0, 3, Group());
  loss.backward({}, /*retain_graph=*/true);
  EXPECT_THROW(loss.backward(), c10::Error);
}

}  // namespace
}  // namespace drrl::test
