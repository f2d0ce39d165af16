// The code of the CUDA kernels for bases, run on the host, against the operators that it stands in
// for.
#include <memory>

#include <gtest/gtest.h>

#include "core/cuda/basis_item.h"
#include "core/cuda/gate_item.h"
#include "core/linalg/basis.h"

namespace drrl {
namespace {

at::Tensor gram(int64_t rows, int64_t d) {
  const auto decay = at::logspace(0, -2, d, 10.0, at::kDouble);
  const auto x = at::matmul(at::randn({rows, d}, at::kDouble) * decay,
                            at::randn({d, d}, at::kDouble));
  return at::matmul(x.t(), x);
}

double relative(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b.to(at::kDouble)).norm() / b.to(at::kDouble).norm()).item<double>();
}

struct Item {
  at::Tensor gram_x, gram_y, start;

  Item(int64_t d, int64_t rank, int64_t rows)
      : gram_x(gram(rows, d)), gram_y(gram(rows, d)), start(at::randn({d, rank}, at::kFloat)) {}
};

at::Tensor scratch(int size) {
  return at::full({size}, std::nan(""), at::kDouble);
}  // poisoned

TEST(CudaItem, UpdatesEqualUpdateBasis) {
  at::manual_seed(1);
  for (const auto& [d, rank, rows] :
       {std::tuple{16, 8, 40}, {64, 32, 300}, {64, 48, 20}, {128, 64, 500}}) {
    const Item item(d, rank, rows);  // the third has fewer rows than its rank
    const int columns = rank + 8, start_columns = rank + 3;  // of rows of more numbers
    auto wide_left = at::full({d, columns}, 7, at::kFloat),
         wide_right = at::full({d, columns}, 7, at::kFloat);
    const auto start = at::constant_pad_nd(item.start, {0, 3}, std::nan(""));
    auto room = scratch(cuda::update_scratch_size(d, rank));
    const cuda::HostBlock block;
    const cuda::UpdateItem<cuda::HostBlock> update(block, d, rank, start_columns, columns, {},
                                                   room.data_ptr<double>());
    ASSERT_TRUE(update.run(2, start.data_ptr<float>(), item.gram_x.data_ptr<double>(),
                           item.gram_y.data_ptr<double>(), wide_left.data_ptr<float>(),
                           wide_right.data_ptr<float>()));
    for (const auto& wide : {wide_left, wide_right}) {
      EXPECT_TRUE(wide.narrow(1, rank, 8).eq(7).all().item<bool>());
    }
    const auto left = wide_left.narrow(1, 0, rank), right = wide_right.narrow(1, 0, rank);
    const Basis expected = update_basis(item.start.unsqueeze(0), item.gram_x.unsqueeze(0),
                                        item.gram_y.unsqueeze(0), 2);
    const auto product = [](const at::Tensor& l, const at::Tensor& r) {
      return at::matmul(l, r.t());
    };
    EXPECT_LT(relative(product(left, right), product(expected.left[0], expected.right[0])), 1e-3)
        << "d = " << d << ", rank " << rank;
    const auto loss = [&](const at::Tensor& l, const at::Tensor& r) {
      return tail_loss({l.unsqueeze(0), r.unsqueeze(0), {}}, item.gram_x.unsqueeze(0),
                       item.gram_y.unsqueeze(0))
          .select(1, rank)
          .item<double>();
    };
    const double total = (item.gram_x * item.gram_y).sum().item<double>();
    EXPECT_NEAR(loss(left, right), loss(expected.left[0], expected.right[0]), 1e-6 * total);
  }
}

TEST(CudaItem, AnIndefiniteGramFails) {
  Item item(16, 8, 40);
  item.start = at::eye(16, at::kFloat).narrow(1, 0, 8).contiguous();
  item.gram_y = at::full({16, 16}, -0.9, at::kDouble) + 1.9 * at::eye(16, at::kDouble);
  auto left = at::empty({16, 8}, at::kFloat), right = at::empty({16, 8}, at::kFloat);
  auto room = scratch(cuda::update_scratch_size(16, 8));
  const cuda::HostBlock block;
  const cuda::UpdateItem<cuda::HostBlock> update(block, 16, 8, 8, 8, {}, room.data_ptr<double>());
  EXPECT_FALSE(update.run(1, item.start.data_ptr<float>(), item.gram_x.data_ptr<double>(),
                          item.gram_y.data_ptr<double>(), left.data_ptr<float>(),
                          right.data_ptr<float>()));
}

TEST(CudaItem, ResidualsEqualResidualFactor) {
  at::manual_seed(2);
  for (const auto& [d, rank] : {std::tuple{16, 8}, {64, 32}, {128, 96}}) {
    const int columns = 16;
    const auto x = gram(200, d), y = gram(200, d);
    const Basis basis = update_basis(at::randn({1, d, rank}, at::kFloat), x.unsqueeze(0),
                                     y.unsqueeze(0), 1);
    const double keys = 256;
    const auto expected = residual_factor(basis, y.unsqueeze(0),
                                          at::full({1}, keys, at::kDouble))[0];
    std::vector<double> signs;  // of residual_factor
    for (int i = 0; i < d * columns; ++i) {
      signs.push_back((static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15ULL) >> 63 != 0 ? 1.0
                                                                                        : -1.0);
    }
    auto factor = at::empty({d, columns}, at::kFloat);
    auto room = scratch(cuda::residual_scratch_size(d, rank, columns));
    const auto wide = [](const at::Tensor& side) {
      return at::constant_pad_nd(side[0], {0, 2}, std::nan(""));
    };
    const auto left = wide(basis.left), right = wide(basis.right);
    cuda::residual_item(cuda::HostBlock(), d, rank, columns, left.data_ptr<float>(),
                        right.data_ptr<float>(), rank + 2, y.data_ptr<double>(), 1 / (2 * keys * d),
                        signs.data(), factor.data_ptr<float>(), room.data_ptr<double>());
    const auto form = [](const at::Tensor& f) { return at::matmul(f, f.t()); };
    EXPECT_LT(relative(form(factor), form(expected)), 1e-3) << "d = " << d << ", rank " << rank;
  }
}

TEST(CudaItem, GatesARowChunkByChunk) {
  at::manual_seed(3);
  const int chunk = 5;
  for (const int keys : {1, 5, 13}) {
    for (const double gate : {0.0, 0.05, 0.3, 2.0}) {
      const auto low = 2 * at::randn({keys}, at::kDouble),
                 full = low + at::randn({keys}, at::kDouble);
      const double before = keys == 1 ? -1.0 : 0.5;
      // The definition, entry by entry.
      auto expected = low.clone();
      auto exact = at::zeros({keys}, at::kBool);
      for (int begin = 0; begin < keys; begin += chunk) {
        const int end = std::min(keys, begin + chunk);
        const double so_far = std::exp(before) +
                              expected.slice(0, 0, end)
                                  .exp()
                                  .sum()
                                  .item<double>();  // earlier chunks with what was exact, this one
                                                    // at low rank
        for (int j = begin; j < end; ++j) {
          if (std::exp(low[j].item<double>()) >= gate * so_far) {
            exact[j] = true;
          }
        }
        expected = at::where(exact, full, expected);
      }
      auto scores = low.clone();
      auto weights = at::zeros({2, keys}, at::kDouble);
      std::unique_ptr<bool[]> marks(new bool[static_cast<size_t>(keys)]);
      auto to = weights.accessor<double, 2>();
      const double sum = cuda::gate_row(
          cuda::HostWarp(), keys, chunk, scores.data_ptr<double>(), full.data_ptr<double>(),
          marks.get(), before, std::log(gate),
          [&](int j, double weight, bool heavy) { to[heavy ? 1 : 0][j] = weight; });
      EXPECT_NEAR(sum, expected.logsumexp(0).item<double>(), 1e-12);
      EXPECT_TRUE(at::allclose(weights.sum(0), (expected - sum).exp(), 1e-12, 0));
      EXPECT_TRUE((weights[1] > 0).equal(exact)) << "gate " << gate << ", " << keys << " keys";
      for (int j = 0; j < keys; ++j) {
        EXPECT_EQ(marks[static_cast<size_t>(j)], exact[j].item<bool>());
      }
    }
  }
}

}  // namespace
}  // namespace drrl
