// The kernels between the products of a model on CUDA against the same by ATen's operators, and a
// model against itself on the CPU.
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "distributed/collectives/group.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/config.h"
#include "models/ops/fused_ops.h"
#include "policy/attention/attention_controller.h"
#include "tests/gpu/gpu_support.h"

namespace drrl {
namespace {

constexpr auto kKernels = Implementation::kKernels;
constexpr auto kComposed = Implementation::kComposed;

class GpuOperators : public testing::TestWithParam<at::ScalarType> {
 protected:
  at::ScalarType wide() const { return GetParam() == at::kDouble ? at::kDouble : at::kFloat; }
  at::Tensor random(at::IntArrayRef sizes, double scale = 1.0) const {
    return random(sizes, GetParam(), scale);
  }
  at::Tensor random(at::IntArrayRef sizes, at::ScalarType dtype, double scale = 1.0) const {
    return at::randn(sizes, at::TensorOptions(at::kCUDA).dtype(at::kDouble)).mul_(scale).to(dtype);
  }
  void expect_same(const at::Tensor& kernels, const at::Tensor& composed) const {
    ASSERT_EQ(kernels.scalar_type(), composed.scalar_type());
    ASSERT_EQ(kernels.sizes(), composed.sizes());
    EXPECT_LE(relative(kernels, composed), GetParam() == at::kDouble  ? 1e-13
                                           : GetParam() == at::kFloat ? 2e-6
                                                                      : 5e-3);
  }
};

TEST_P(GpuOperators, Norm) {
  DRRL_NEEDS_GPU();
  for (const auto& [rows, n] : std::vector<std::pair<int64_t, int64_t>>{
           {1, 3}, {70, 33}, {3000, 576}, {5, 12000}, {2, 20000}, {0, 8}}) {
    const at::Tensor x = random({rows, n}, 2.0), weight = random({n}, wide()),
                     dy = random({rows, n});
    const auto a = raw::rms_norm_forward(x, weight, 1e-5, kKernels),
               b = raw::rms_norm_forward(x, weight, 1e-5, kComposed);
    expect_same(a.y, b.y);
    expect_same(a.rstd, b.rstd);
    for (const at::Tensor& dh : {at::Tensor(), random({rows, n})}) {
      const auto da = raw::rms_norm_backward(dy, dh, x, weight, b.rstd, kKernels),
                 db = raw::rms_norm_backward(dy, dh, x, weight, b.rstd, kComposed);
      expect_same(da.x, db.x);
      expect_same(da.weight, db.weight);
    }
  }
}

TEST_P(GpuOperators, Rope) {
  DRRL_NEEDS_GPU();
  for (const int64_t d : {10, 64, 128}) {
    const int64_t batch = 2, length = 37, heads = 6, groups = 3;
    const at::Tensor angle = random({length, d / 2}, at::kFloat, 10.0), cos = angle.cos(),
                     sin = angle.sin();
    const at::Tensor qkv = random({batch * length, (heads + 2 * groups) * d});
    const auto [qa, ka, va] = raw::rope_split_forward(qkv, cos, sin, batch, heads, groups,
                                                      kKernels);
    const auto [qb, kb, vb] = raw::rope_split_forward(qkv, cos, sin, batch, heads, groups,
                                                      kComposed);
    expect_same(qa, qb);
    expect_same(ka, kb);
    EXPECT_TRUE(va.equal(vb));
    const at::Tensor dq = random({batch, length, heads, d}).transpose(1, 2),
                     dk = random({batch, groups, d, length}).transpose(2, 3);
    const at::Tensor dv = random({batch, 1, length, d}).expand({batch, groups, length, d});
    expect_same(raw::rope_split_backward(dq, dk, dv, cos, sin, kKernels),
                raw::rope_split_backward(dq, dk, dv, cos, sin, kComposed));
  }
}

TEST_P(GpuOperators, Swiglu) {
  DRRL_NEEDS_GPU();
  for (const int64_t n : {1, 7, 8, 1536}) {
    at::Tensor gate_up = random({65, 2 * n}, 4.0);
    gate_up[0][0] = 200.0;  // where exp would overflow or vanish
    gate_up[1][0] = -200.0;
    const at::Tensor dy = random({65, n});
    expect_same(raw::swiglu_forward(gate_up, kKernels), raw::swiglu_forward(gate_up, kComposed));
    const auto a = raw::swiglu_backward(gate_up, dy, kKernels),
               b = raw::swiglu_backward(gate_up, dy, kComposed);
    expect_same(a.gate_up, b.gate_up);
    expect_same(a.y, b.y);
    EXPECT_TRUE(at::isfinite(a.gate_up).all().item<bool>());
  }
}

TEST_P(GpuOperators, Exponentials) {
  DRRL_NEEDS_GPU();
  for (const int64_t n : {1, 50, 49152}) {
    const at::Tensor padded = random({33, n + 16}, 5.0);
    at::Tensor a = padded.clone().narrow(1, 0, n), b = padded.clone().narrow(1, 0, n);
    const auto [max_a, sum_a] = raw::exp_rows_(a, kKernels);
    const auto [max_b, sum_b] = raw::exp_rows_(b, kComposed);
    expect_same(a, b);
    EXPECT_TRUE(max_a.equal(max_b));
    expect_same(sum_a, sum_b);
    const at::Tensor factor = random({33}, wide());
    raw::scale_rows_(a, factor, kKernels);
    raw::scale_rows_(b, factor, kComposed);
    expect_same(a, b);
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, GpuOperators,
                         testing::Values(at::kFloat, at::kDouble, at::kBFloat16),
                         [](const auto& tested) {
                           return std::string(c10::toString(tested.param));
                         });

// Loss and gradients of a small model on the GPU against the CPU's.
TEST(GpuModel, TrainsAsOnTheCpu) {
  DRRL_NEEDS_GPU();
  const ModelConfig config = ModelConfig::parse(
      R"({"model_type": "llama", "vocab_size": 97, "hidden_size": 64, )"
      R"("intermediate_size": 96, "num_hidden_layers": 2, )"
      R"("num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, )"
      R"("rope_theta": 10000.0, "tie_word_embeddings": true})",
      "test");
  const at::Tensor tokens = at::randint(0, 97, {2, 257}, at::kLong);
  const auto gradients = [&](at::Device device, at::ScalarType dtype) {
    ModelOptions options;
    options.device = device;
    options.dtype = dtype;
    options.loss_chunk_rows = 200;  // the last chunk is shorter
    CausalLM model(config, Group(), make_exact_attention(), options);
    model.initialize(7);
    const LossResult result = model.loss(tokens.narrow(1, 0, 256).contiguous(),
                                         tokens.narrow(1, 1, 256).contiguous(), 1.0 / 512);
    torch::autograd::backward({result.loss_sum}, {});
    std::vector<at::Tensor> all = {result.loss_sum.detach().cpu()};
    for (const Parameter& p : model.parameters()) {
      all.push_back(p.value.grad().cpu());
    }
    return all;
  };
  const auto expected = gradients(at::kCPU, at::kFloat);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto got = gradients(at::Device(at::kCUDA, 0), dtype);
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_LE(relative(got[i], expected[i]),
                dtype == at::kFloat ? (i == 0 ? 1e-6 : 1e-4) : (i == 0 ? 2e-3 : 3e-2))
          << c10::toString(dtype) << " tensor " << i;
      EXPECT_EQ(got[i].scalar_type(), at::kFloat);
    }
  }
}

}  // namespace
}  // namespace drrl
