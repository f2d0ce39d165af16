// What runs on CUDA against the same on the CPU. Skipped without a GPU, unless DRRL_REQUIRE_GPU is
// set (tests/run_gpu.sh): then a failure.
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "core/attention/exact_attention.h"
#include "core/attention/lowrank_attention.h"
#include "core/attention/reference.h"
#include "core/error.h"
#include "core/linalg/basis.h"
#include "core/linalg/eigensolver.h"
#include "core/linalg/gram.h"
#include "policy/attention/lowrank_controller.h"
#include "tests/gpu/gpu_support.h"

namespace drrl {
namespace {

// Symmetric positive semidefinite matrices with decaying spectra, [n, d, d] float64.
at::Tensor grams(int64_t n, int64_t d) {
  const auto decay = at::logspace(0, -1.5, d, 10.0, at::TensorOptions().dtype(at::kDouble));
  const auto rows = at::matmul(at::randn({n, 2 * d, d}, at::kDouble) * decay,
                               at::randn({n, d, d}, at::kDouble));
  return at::bmm(rows.transpose(1, 2), rows) / static_cast<double>(d);
}

class GpuMatrices : public testing::TestWithParam<std::tuple<int64_t, at::ScalarType>> {};

TEST_P(GpuMatrices, EighSolvesTheProblemAndAgreesWithTheCpu) {
  DRRL_NEEDS_GPU();
  const auto [d, dtype] = GetParam();
  at::manual_seed(3);
  const auto matrices = grams(40, d).to(dtype);
  const auto [values, vectors] = batched_eigh(matrices.to(at::kCUDA));
  const auto [expected, unused] = batched_eigh(matrices);
  const double tolerance = dtype == at::kDouble ? 1e-11 : 2e-5;
  EXPECT_EQ(values.scalar_type(), dtype);
  EXPECT_LT(relative(values, expected), tolerance);
  const auto u = vectors.to(at::kCPU, at::kDouble), s = values.to(at::kCPU, at::kDouble);
  EXPECT_LT(relative(at::bmm(u.transpose(1, 2), u), at::eye(d, at::kDouble).expand_as(u)),
            tolerance);
  EXPECT_LT(relative(at::bmm(u * s.unsqueeze(1), u.transpose(1, 2)), matrices), tolerance);
}

INSTANTIATE_TEST_SUITE_P(Sizes, GpuMatrices,
                         testing::Combine(testing::Values(16, 64, 128),
                                          testing::Values(at::kDouble, at::kFloat)));

TEST(Gpu, AMatrixThatIsNotFiniteIsAnError) {
  DRRL_NEEDS_GPU();
  auto matrices = grams(5, 64);
  matrices[3].fill_(std::nan(""));
  EXPECT_THROW(solve_basis(matrices.to(at::kCUDA), grams(5, 64).to(at::kCUDA)), Error);
}

TEST(Gpu, UpdatesOfBadGramsAreNanAndALaterCallSaysSo) {
  DRRL_NEEDS_GPU();
  at::manual_seed(7);
  const auto sound = grams(5, 64).to(at::kCUDA),
             start = at::randn({5, 64, 32}, at::kFloat).to(at::kCUDA);
  auto bad = sound.clone();
  bad[3].fill_(std::nan(""));
  const Basis basis = update_basis(start, sound, bad, 1);
  EXPECT_TRUE(at::isnan(basis.left[3]).all().item<bool>() &&
              at::isnan(basis.right[3]).all().item<bool>());
  EXPECT_TRUE(at::isfinite(basis.left[2]).all().item<bool>());
  EXPECT_THROW(update_basis(start, sound, sound, 1), Error);
  EXPECT_NO_THROW(update_basis(start, sound, sound, 1));
}

TEST(Gpu, UpdatesAndResidualsAgreeWithTheCpu) {
  DRRL_NEEDS_GPU();
  for (const auto& [d, rank] :
       {std::pair<int64_t, int64_t>{64, 32}, {128, 32}, {128, 64}, {128, 96}}) {
    at::manual_seed(8);
    const auto gram_x = grams(150, d), gram_y = grams(150, d),
               start = at::randn({150, d, rank}, at::kFloat);
    const Basis cpu = update_basis(start, gram_x, gram_y, 2);
    const Basis gpu = update_basis(start.to(at::kCUDA), gram_x.to(at::kCUDA), gram_y.to(at::kCUDA),
                                   2);
    const auto product = [](const Basis& b) {
      return at::bmm(b.left.to(at::kCPU), b.right.transpose(1, 2).to(at::kCPU));
    };
    EXPECT_LT(relative(product(gpu), product(cpu)), 1e-3) << "d = " << d << ", rank " << rank;
    const auto keys = at::full({150}, 256.0, at::kDouble);
    const auto form = [](const at::Tensor& f) {
      return at::bmm(f, f.transpose(1, 2)).to(at::kCPU);
    };
    EXPECT_LT(relative(form(residual_factor({cpu.left.to(at::kCUDA), cpu.right.to(at::kCUDA), {}},
                                            gram_y.to(at::kCUDA), keys.to(at::kCUDA))),
                       form(residual_factor(cpu, gram_y, keys))),
              1e-3)
        << "d = " << d << ", rank " << rank;
  }
}

// One launch, of ranks that fit into shared memory and (96 at d = 128) of one that does not.
TEST(Gpu, UpdatesAndResidualsOfRanksThatDifferAgreeWithTheCpu) {
  DRRL_NEEDS_GPU();
  for (const int64_t d : {64, 128}) {
    at::manual_seed(9);
    std::vector<int64_t> ranks;
    for (int64_t i = 0; i < 48; ++i) {
      ranks.push_back(
          std::vector<int64_t>{16, 32, d, d / 2, d / 4 * 3}[static_cast<size_t>(i % 5)]);
    }
    const auto gram_x = grams(48, d), gram_y = grams(6, d),
               start = at::randn({4, d, d}, at::kFloat), keys = at::arange(48, at::kLong) + 100;
    const Basis cpu = update_bases(start, gram_x, gram_y, ranks, 1);
    const Basis gpu = update_bases(start.to(at::kCUDA), gram_x.to(at::kCUDA), gram_y.to(at::kCUDA),
                                   ranks, 1);
    const auto cpu_factors = residual_factor(cpu, gram_x, keys, ranks);
    const auto gpu_factors = residual_factor({cpu.left.to(at::kCUDA), cpu.right.to(at::kCUDA), {}},
                                             gram_x.to(at::kCUDA), keys.to(at::kCUDA), ranks)
                                 .to(at::kCPU);
    for (int64_t i = 0; i < 48; ++i) {
      const int64_t rank = ranks[static_cast<size_t>(i)];
      if (rank == d) {
        continue;
      }
      const auto product = [&](const Basis& b) {
        return at::matmul(b.left[i].narrow(1, 0, rank).to(at::kCPU),
                          b.right[i].narrow(1, 0, rank).to(at::kCPU).t());
      };
      EXPECT_LT(relative(product(gpu), product(cpu)), 1e-3)
          << "item " << i << ", d = " << d << ", rank " << rank;
      const auto form = [&](const at::Tensor& f) { return at::matmul(f[i], f[i].t()); };
      EXPECT_LT(relative(form(gpu_factors), form(cpu_factors)), 1e-3)
          << "item " << i << ", d = " << d << ", rank " << rank;
    }
  }
}

TEST(Gpu, BasesAgreeWithTheCpu) {
  DRRL_NEEDS_GPU();
  for (const int64_t d : {64, 128}) {
    at::manual_seed(4);
    const auto gram_x = grams(20, d), gram_y = grams(20, d);
    const Basis cpu = solve_basis(gram_x, gram_y);
    const Basis gpu = solve_basis(gram_x.to(at::kCUDA), gram_y.to(at::kCUDA));
    EXPECT_TRUE(gpu.left.is_cuda() && gpu.right.is_cuda());
    EXPECT_LT(relative(gpu.singular_values, cpu.singular_values), 1e-9);
    for (const int64_t rank : {16L, 32L, d}) {  // signs of columns are free, their products are not
      const auto product = [&](const Basis& b) {
        return at::bmm(b.left.narrow(2, 0, rank).to(at::kCPU),
                       b.right.narrow(2, 0, rank).transpose(1, 2).to(at::kCPU));
      };
      EXPECT_LT(relative(product(gpu), product(cpu)), 1e-4) << "d = " << d << ", rank " << rank;
    }
    const auto loss = tail_loss(gpu, gram_x.to(at::kCUDA), gram_y.to(at::kCUDA));
    EXPECT_LT(relative(loss, tail_loss(cpu, gram_x, gram_y)), 1e-4);
  }
}

struct Case {
  int64_t heads, groups, length, d;
  Geometry geometry;
  std::vector<Ranks> ranks;  // dealt out in turn over the far pairs
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << "H = " << c.heads << ", G = " << c.groups << ", L = " << c.length << ", d = " << c.d
      << ", ranks";
  for (const Ranks& r : c.ranks) {
    out << " (" << r.qk << ", " << r.v << (r.gated(c.d) ? c10::str(", gate ", r.gate) : "") << ")";
  }
  return out;
}

struct Inputs {
  at::Tensor q, k, v, grad;

  Inputs to(at::Device device, at::ScalarType dtype) const {
    return {q.to(device, dtype), k.to(device, dtype), v.to(device, dtype), grad.to(device, dtype)};
  }
};

Inputs make_inputs(const Case& c) {
  at::manual_seed(5);
  const auto mix = at::diag(
      at::logspace(0.3, -1, c.d, 10.0, at::TensorOptions().dtype(at::kDouble)));
  const auto make = [&](int64_t heads) {
    return at::matmul(at::randn({2, heads, c.length, c.d}, at::kDouble), mix);
  };
  return {make(c.heads), make(c.groups), make(c.groups),
          at::randn({2, c.heads, c.length, c.d}, at::kDouble)};
}

at::Tensor make_w_o(const Case& c) {
  at::manual_seed(6);
  return at::randn({c.heads * c.d, c.heads * c.d});
}

c10::intrusive_ptr<LowRankPlan> make_plan(const Case& c, const Inputs& in, at::Device device) {
  const BlockTree tree(c.length, c.geometry);
  const PairGrams grams = pair_grams(in.q, in.k, in.v, tree);
  const auto weight = output_gram(make_w_o(c), c.groups, c.d).unsqueeze(1).expand_as(grams.values);
  const auto moved = [&](const Basis& b) {
    return Basis{b.left.to(device), b.right.to(device), b.singular_values.to(device)};
  };
  std::vector<Ranks> ranks;
  for (int64_t i = 0; i < 2 * c.groups * tree.num_pairs(); ++i) {
    ranks.push_back(c.ranks[static_cast<size_t>(i) % c.ranks.size()]);
  }
  return c10::make_intrusive<LowRankPlan>(
      tree, ranks, moved(solve_basis(grams.queries.flatten(0, 2), grams.keys.flatten(0, 2))),
      moved(solve_basis(grams.values.flatten(0, 2), weight.flatten(0, 2))));
}

// out, dq, dk, dv
template <typename Attention>
std::vector<at::Tensor> forward_and_backward(const Inputs& in, const Attention& attention) {
  const auto leaf = [](const at::Tensor& x) { return x.detach().clone().requires_grad_(true); };
  const auto q = leaf(in.q), k = leaf(in.k), v = leaf(in.v);
  const at::Tensor out = attention(q, k, v);
  auto result = torch::autograd::grad({out}, {q, k, v}, {in.grad});
  result.insert(result.begin(), out.detach());
  return result;
}

void expect_close(const std::vector<at::Tensor>& got, const std::vector<at::Tensor>& expected,
                  at::ScalarType dtype) {
  const char* names[] = {"out", "dq", "dk", "dv"};
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_TRUE(got[i].is_cuda()) << names[i];
    EXPECT_EQ(got[i].scalar_type(), dtype) << names[i];
    EXPECT_LT(relative(got[i], expected[i]), dtype == at::kFloat ? 2e-5 : 4e-2)
        << names[i] << ", " << dtype;
  }
}

class GpuOperator : public testing::TestWithParam<Case> {};

TEST_P(GpuOperator, LowRankEqualsTheReferenceInDouble) {
  DRRL_NEEDS_GPU();
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Inputs gpu = make_inputs(GetParam()).to(at::kCUDA, dtype);
    const Inputs cpu = gpu.to(at::kCPU, at::kDouble);  // the same numbers
    const auto plan = make_plan(GetParam(), cpu, at::kCPU),
               plan_gpu = make_plan(GetParam(), cpu, at::kCUDA);
    expect_close(
        forward_and_backward(
            gpu, [&](auto& q, auto& k, auto& v) { return lowrank_attention(q, k, v, plan_gpu); }),
        forward_and_backward(cpu,
                             [&](auto& q, auto& k, auto& v) {
                               return reference::lowrank_attention(q, k, v, *plan);
                             }),
        dtype);
  }
}

TEST_P(GpuOperator, ExactEqualsPyTorchAndTheReference) {
  DRRL_NEEDS_GPU();
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Inputs gpu = make_inputs(GetParam()).to(at::kCUDA, dtype);
    const int64_t copies = GetParam().heads / GetParam().groups;
    const auto ours = forward_and_backward(
        gpu, [](auto& q, auto& k, auto& v) { return exact_attention(q, k, v); });
    const auto pytorch = forward_and_backward(gpu, [&](auto& q, auto& k, auto& v) {
      return at::scaled_dot_product_attention(q, k.repeat_interleave(copies, 1),
                                              v.repeat_interleave(copies, 1), {}, 0.0,
                                              /*is_causal=*/true);
    });
    const auto expected = forward_and_backward(
        gpu.to(at::kCPU, at::kDouble),
        [](auto& q, auto& k, auto& v) { return reference::exact_attention(q, k, v); });
    expect_close(ours, pytorch, dtype);
    expect_close(ours, expected, dtype);
  }
}

// All on the GPU: Grams, bases, ranks, operator; against all on the CPU.
TEST_P(GpuOperator, TheControllerAgreesWithTheCpu) {
  DRRL_NEEDS_GPU();
  const Case& c = GetParam();
  const Inputs cpu = make_inputs(c).to(at::kCPU, at::kFloat);
  const auto run = [&](at::Device device) {
    LowRankController controller(make_fixed_policy(32, c.d), c.geometry);
    std::shared_ptr<LayerPlan> plan;
    return forward_and_backward(cpu.to(device, at::kFloat), [&](auto& q, auto& k, auto& v) {
      return controller.attend(0, q, k, v, make_w_o(c).to(device), plan);
    });
  };
  const auto got = run(at::kCUDA), expected = run(at::kCPU);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_LT(relative(got[i], expected[i]), 1e-3) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, GpuOperator,
    testing::Values(
        Case{9, 3, 1100, 64, {256, 4}, {{32, 32}}},           // grouped heads, short last block
        Case{4, 4, 516, 64, {128, 4}, {{32, 64}, {64, 32}}},  // one side exact
        Case{8,
             2,
             700,
             128,
             {128, 0},
             {{32, 32}, {96, 64}, {64, 32}, {32, 64}}},  // no sinks, r != r_v, shared calls
        Case{2, 1, 300, 128, {64, 1}, {{128, 128}, {64, 32}}},
        Case{4, 2, 516, 64, {128, 4}, {{20, 20}, {12, 44}}},  // widths that kernels do not take as
                                                              // they are
        Case{9, 3, 1100, 64, {256, 4}, {{32, 32, 0.01F}}},    // gates: some entries exact
        Case{8, 2, 700, 128, {128, 4}, {{32, 64, 0.02F}, {128, 32, 0.005F}, {32, 32}}}));

}  // namespace
}  // namespace drrl
