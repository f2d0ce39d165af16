#include "core/linalg/basis.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/linalg/eigensolver.h"
#include "core/linalg/gram.h"
#include "tests/support/error_of.h"

namespace drrl {
namespace {

// Rows with a decaying spectrum, as real queries and keys have.
at::Tensor rows(int64_t n, int64_t m, int64_t d) {
  const auto decay = at::logspace(0, -2, d, 10.0, at::kDouble);
  return at::matmul(at::randn({n, m, d}, at::kDouble) * decay, at::randn({d, d}, at::kDouble));
}

at::Tensor gram(const at::Tensor& x) {
  return at::matmul(x.transpose(1, 2), x);
}

TEST(Basis, IsTheBestApproximationAtEveryRank) {
  at::manual_seed(1);
  const int64_t n = 3, d = 16;
  const auto x = rows(n, 40, d), y = rows(n, 50, d);
  const Basis basis = solve_basis(gram(x), gram(y));
  const auto product = at::matmul(x, y.transpose(1, 2));
  const auto best = at::linalg_svdvals(product).narrow(1, 0, d);
  EXPECT_TRUE(at::allclose(basis.singular_values, best, 1e-6, 1e-6 * best.max().item<double>()));
  for (int64_t r = 1; r <= d; ++r) {
    const auto p_x = basis.left.narrow(2, 0, r).to(at::kDouble),
               p_y = basis.right.narrow(2, 0, r).to(at::kDouble);
    const auto low = at::matmul(at::matmul(x, p_x), at::matmul(y, p_y).transpose(1, 2));
    const auto loss = (product - low).pow(2).sum({1, 2});
    const auto optimum = best.pow(2).slice(1, r).sum(1);
    const auto total = best.pow(2).sum(1);
    EXPECT_TRUE(((loss - optimum).abs() <= 1e-4 * optimum + 1e-9 * total).all().item<bool>())
        << "rank " << r << ": " << loss << optimum;
  }
}

TEST(Basis, TailLossIsTheTrueLossOfAnyBasisOnAnyData) {
  at::manual_seed(2);
  const int64_t n = 2, d = 16;
  const Basis stale = solve_basis(gram(rows(n, 40, d)), gram(rows(n, 40, d)));
  const auto x = rows(n, 33, d), y = rows(n, 20, d);  // data that the basis has not seen
  const auto tail = tail_loss(stale, gram(x), gram(y));
  ASSERT_EQ(tail.sizes(), at::IntArrayRef({n, d + 1}));
  const auto product = at::matmul(x, y.transpose(1, 2));
  const auto total = product.pow(2).sum({1, 2});
  EXPECT_TRUE(at::allclose(tail.select(1, 0), total, 1e-10));
  for (int64_t r = 1; r <= d; ++r) {
    const auto low = at::matmul(
        at::matmul(x, stale.left.narrow(2, 0, r).to(at::kDouble)),
        at::matmul(y, stale.right.narrow(2, 0, r).to(at::kDouble)).transpose(1, 2));
    const auto loss = (product - low).pow(2).sum({1, 2});
    EXPECT_TRUE(((tail.select(1, r) - loss).abs() <= 1e-10 * total).all().item<bool>())
        << "rank " << r;
  }
}

TEST(Basis, UpdatesReachTheBestOfTheirRank) {
  at::manual_seed(6);
  const int64_t n = 3, d = 16, r = 6;
  const auto g_x = gram(rows(n, 40, d)), g_y = gram(rows(n, 50, d));
  const auto best = tail_loss(solve_basis(g_x, g_y), g_x, g_y).select(1, r);
  const auto loss_after = [&](const at::Tensor& start, int64_t steps) {
    return tail_loss(update_basis(start, g_x, g_y, steps), g_x, g_y).select(1, r);
  };
  const auto noise = at::randn({n, d, r});
  at::Tensor last = loss_after(noise, 0);
  EXPECT_TRUE((last > 1.2 * best).all().item<bool>());
  for (const int64_t steps : {1, 2, 4}) {  // never away from the optimum
    const auto loss = loss_after(noise, steps);
    EXPECT_TRUE((loss <= last * (1 + 1e-6)).all().item<bool>()) << steps;
    last = loss;
  }
  EXPECT_TRUE((loss_after(noise, 60) < 1.001 * best).all().item<bool>());
  // From the solution itself nothing is left to do, and the left factor alone already is the
  // solution's.
  EXPECT_TRUE((loss_after(solve_basis(g_x, g_y).right.narrow(2, 0, r), 0) < (1 + 1e-4) * best)
                  .all()
                  .item<bool>());
}

TEST(Basis, UpdatesSurviveDependentColumnsAndRankDeficientGrams) {
  at::manual_seed(7);
  const auto g_x = gram(rows(2, 5, 16)), g_y = gram(rows(2, 4, 16));  // rank 4 at most
  auto start = at::randn({2, 16, 8});
  start.select(2, 3).copy_(start.select(2, 2));
  const Basis basis = update_basis(start, g_x, g_y, 3);
  const auto tail = tail_loss(basis, g_x, g_y);
  EXPECT_TRUE(at::isfinite(basis.left).all().item<bool>() &&
              at::isfinite(basis.right).all().item<bool>());
  EXPECT_TRUE((tail.select(1, 8) <= 1e-4 * tail.select(1, 0)).all().item<bool>()) << tail;
}

TEST(Basis, TheResidualFactorGivesHalfTheMeanSquareOfWhatTheScoresLose) {
  at::manual_seed(8);
  const int64_t n = 2, d = 32, r = 5, keys = 60;
  const auto x = rows(n, 40, d), y = rows(n, keys, d);
  const Basis all = solve_basis(gram(x), gram(y));
  const Basis basis{all.left.narrow(2, 0, r), all.right.narrow(2, 0, r), {}};
  const auto factor = residual_factor(basis, gram(y),
                                      at::full({n}, static_cast<double>(keys), at::kDouble));
  ASSERT_EQ(factor.sizes(), at::IntArrayRef({n, d, kResidualColumns}));
  const auto q = rows(n, 7, d);  // any queries
  const auto left = basis.left.to(at::kDouble), right = basis.right.to(at::kDouble);
  const auto lost = (at::matmul(q, y.transpose(1, 2)) -
                     at::matmul(at::matmul(q, left), at::matmul(y, right).transpose(1, 2))) /
                    std::sqrt(32.0);
  const auto expected = 0.5 * lost.pow(2).mean(2);
  const auto got = residual_correction(q, factor);
  EXPECT_TRUE((got <= expected * (1 + 1e-5)).all().item<bool>())
      << "more than there is: " << got << expected;
  EXPECT_TRUE((got >= 0.9 * expected).all().item<bool>())
      << "the leading part is missing: " << got << expected;
}

TEST(Basis, AFreshBasisLosesExactlyTheTailOfItsSpectrum) {  // the paper's Eq. 8 on one spectrum
  at::manual_seed(3);
  const auto g_x = gram(rows(4, 64, 32)), g_y = gram(rows(4, 64, 32));
  const Basis basis = solve_basis(g_x, g_y);
  const auto tail = tail_loss(basis, g_x, g_y);
  const auto squares = basis.singular_values.pow(2);
  const auto total = squares.sum(1, true);
  const auto expected = total - at::cat({at::zeros({4, 1}, at::kDouble), squares.cumsum(1)}, 1);
  EXPECT_LT(((tail - expected).abs() / total).max().item<double>(), 1e-8);
}

TEST(Basis, SurvivesRankDeficientGrams) {
  at::manual_seed(4);
  const auto x = rows(2, 5, 16), y = rows(2, 7, 16);  // fewer rows than columns
  const Basis basis = solve_basis(gram(x), gram(y));
  EXPECT_TRUE(at::isfinite(basis.left).all().item<bool>() &&
              at::isfinite(basis.right).all().item<bool>());
  const auto tail = tail_loss(basis, gram(x), gram(y));
  EXPECT_LT((tail.select(1, 5) / tail.select(1, 0)).max().item<double>(),
            1e-8);  // rank 5 is all there is
  const Basis zero = solve_basis(at::zeros({1, 8, 8}, at::kDouble),
                                 at::zeros({1, 8, 8}, at::kDouble));
  EXPECT_EQ(zero.left.abs().max().item<float>(), 0.0f);
}

TEST(Basis, OneMatrixDoesNotDependOnItsNeighboursInTheBatch) {
  at::manual_seed(5);
  auto g_x = gram(rows(4, 64, 16)), g_y = gram(rows(4, 64, 16));
  const Basis before = solve_basis(g_x, g_y);
  g_x[3] = gram(rows(1, 2, 16))[0];  // a semidefinite neighbour that needs jitter
  g_y[3] = gram(rows(1, 2, 16))[0];
  const Basis after = solve_basis(g_x, g_y);
  EXPECT_TRUE(at::equal(before.left.narrow(0, 0, 3), after.left.narrow(0, 0, 3)));
  EXPECT_TRUE(at::equal(before.right.narrow(0, 0, 3), after.right.narrow(0, 0, 3)));
}

TEST(Basis, RefusesWhatIsNotFinite) {
  auto g = at::eye(8, at::kDouble).repeat({3, 1, 1});
  g[1][2][2] = std::numeric_limits<double>::quiet_NaN();
  const std::string message = error_of(
      ErrorKind::kNumerics, [&] { solve_basis(g, at::eye(8, at::kDouble).repeat({3, 1, 1})); });
  EXPECT_NE(message.find("matrix 1 of 3"), std::string::npos) << message;
}

TEST(Solver, EigenpairsReproduceTheMatrices) {
  at::manual_seed(6);
  const auto a = gram(rows(7, 30, 24));
  const auto [values, vectors] = batched_eigh(a);
  const auto rebuilt = at::matmul(vectors * values.unsqueeze(1), vectors.transpose(1, 2));
  EXPECT_LT(((rebuilt - a).norm() / a.norm()).item<double>(), 1e-12);
  EXPECT_LT((at::matmul(vectors.transpose(1, 2), vectors) - at::eye(24, at::kDouble))
                .abs()
                .max()
                .item<double>(),
            1e-12);
}

TEST(PairGrams, AreThoseOfTheLeftNodesOnly) {
  at::manual_seed(7);
  const int64_t batch = 2, heads = 6, groups = 3, length = 75, d = 8;
  const auto q = at::randn({batch, heads, length, d}), k = at::randn({batch, groups, length, d}),
             v = at::randn({batch, groups, length, d});
  const BlockTree tree(length, {8, 3});
  const PairGrams grams = pair_grams(q, k, v, tree);
  ASSERT_EQ(grams.keys.sizes(), at::IntArrayRef({batch, groups, tree.num_pairs(), d, d}));
  for (const PairRun& run : tree.runs()) {
    for (int64_t i = 0; i < run.count; ++i) {
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t g = 0; g < groups; ++g) {
          const auto cut = [&](const at::Tensor& x) {
            return x.narrow(0, run.key_begin + i * run.stride, run.key_rows).to(at::kDouble);
          };
          const auto close = [](const at::Tensor& got, const at::Tensor& x) {
            return at::allclose(got, at::matmul(x.t(), x), 1e-5, 1e-4);
          };
          const int64_t p = run.first_pair + i;
          EXPECT_TRUE(close(grams.keys[b][g][p], cut(k[b][g])));
          EXPECT_TRUE(close(grams.values[b][g][p], cut(v[b][g])));
          EXPECT_TRUE(
              close(grams.queries[b][g][p], at::cat({cut(q[b][2 * g]), cut(q[b][2 * g + 1])})));
        }
      }
    }
  }
}

// float32 bases take the CPU's own kernel, float64 ones the general path.
TEST(Basis, KernelAndGeneralPathAgree) {
  at::manual_seed(12);
  const int64_t d = 64;
  const auto gx = gram(rows(5, 300, d));
  auto gy = gram(rows(5, 300, d));
  gy[2].copy_(gram(rows(1, 20, d))[0]);  // fewer rows than columns
  gy[3].zero_();
  const auto product_of = [](const Basis& b) {
    return at::matmul(b.left.to(at::kDouble), b.right.to(at::kDouble).transpose(1, 2));
  };
  const auto keys = at::full({5}, 300.0, at::kDouble);
  for (const int64_t rank : {8, 16, 48}) {
    SCOPED_TRACE(rank);
    auto start = at::randn({5, d, rank});
    start[1].select(1, 3).zero_();
    for (const int64_t steps : {0, 2}) {
      const Basis kernel = update_basis(start, gx, gy, steps),
                  general = update_basis(start.to(at::kDouble), gx, gy, steps);
      const auto expected = product_of(general);
      EXPECT_LT(((product_of(kernel) - expected).norm() / expected.norm()).item<double>(), 1e-4)
          << steps << " steps";
      const auto f = residual_factor(general, gy, keys);
      const auto g = residual_factor(
          {general.left.to(at::kDouble), general.right.to(at::kDouble), {}}, gy, keys);
      const auto square = [](const at::Tensor& x) { return at::matmul(x, x.transpose(1, 2)); };
      EXPECT_LT(((square(f) - square(g)).norm() / square(g).norm()).item<double>(), 1e-4);
      EXPECT_EQ(f[3].abs().max().item<float>(), 0);
    }
  }
}

TEST(Basis, UpdatesOfDifferentRanksInOneCallAreThoseOfEachAlone) {
  at::manual_seed(13);
  const int64_t d = 64;
  const auto gx = gram(rows(6, 300, d)), gy = gram(rows(3, 300, d));
  const std::vector<int64_t> ranks = {8, d, 48, 16, 8, d};
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {  // by the kernel, and in general
    const auto start = at::randn({2, d, d}, dtype);
    const Basis all = update_bases(start, gx, gy, ranks, 1);
    ASSERT_EQ(all.left.sizes(), at::IntArrayRef({6, d, 48}));
    for (int64_t i = 0; i < 6; ++i) {
      if (const int64_t rank = ranks[static_cast<size_t>(i)]; rank < d) {
        const Basis alone = update_basis(start.slice(0, i / 3, i / 3 + 1).narrow(2, 0, rank),
                                         gx.slice(0, i, i + 1), gy.slice(0, i / 2, i / 2 + 1), 1);
        EXPECT_TRUE(at::allclose(all.left[i].narrow(1, 0, rank), alone.left[0], 1e-6, 0)) << i;
        EXPECT_TRUE(at::allclose(all.right[i].narrow(1, 0, rank), alone.right[0], 1e-6, 0)) << i;
      }
    }
  }
  const auto start = at::randn({2, d, d});
  EXPECT_EQ(update_basis(start, gx.narrow(0, 0, 2), gy.narrow(0, 0, 2), 1).left.sizes(),
            start.sizes());  // a whole rank is one, too
  auto bad = gx.clone();
  bad[4][1][2] = std::nan("");
  EXPECT_NE(error_of(ErrorKind::kNumerics, [&] { update_bases(start, bad, gy, ranks, 1); })
                .find("not finite"),
            std::string::npos);
  EXPECT_THROW(update_bases(start, gx, gy, {8, 8, 8}, 1), c10::Error);
}

TEST(Basis, ResidualsOfRanksThatDiffer) {
  at::manual_seed(11);
  const int64_t d = 64, columns = 48;
  const auto gx = gram(rows(6, 80, d)), gy = gram(rows(6, 80, d)),
             keys = at::arange(6, at::kLong) * 10 + 30;
  const Basis basis = update_basis(at::randn({6, d, columns}), gx, gy, 1);
  for (const auto& ranks : {std::vector<int64_t>{8, d, 48, 16, 8, d},
                            {8, d, 48, 13, 8, d}}) {  // by the kernel, and in general
    const auto all = residual_factor(basis, gy, keys, ranks);
    for (int64_t i = 0; i < 6; ++i) {
      if (const int64_t rank = ranks[static_cast<size_t>(i)]; rank < d) {
        const auto of = [&](const at::Tensor& x) { return x.slice(0, i, i + 1); };
        const auto first = [&](const at::Tensor& x) { return of(x).narrow(2, 0, rank); };
        const auto alone = residual_factor({first(basis.left), first(basis.right), {}}, of(gy),
                                           of(keys))[0];
        const auto form = [](const at::Tensor& f) { return at::matmul(f, f.t()); };
        EXPECT_LT((form(all[i]) - form(alone)).norm().item<double>(),
                  1e-3 * form(alone).norm().item<double>())
            << i;
      }
    }
  }
  EXPECT_THROW(residual_factor(basis, gy, keys, {8, 8}), c10::Error);
  const auto none = [](const at::Tensor& x) { return x.narrow(0, 0, 0); };
  EXPECT_EQ(
      residual_factor({none(basis.left), none(basis.right), {}}, none(gy), none(keys)).size(0), 0);
}

TEST(Basis, StaleLossIsThatOfTheBestPartner) {
  at::manual_seed(10);
  const int64_t d = 12;
  const auto gx = gram(rows(3, 40, d)), gy = gram(rows(3, 40, d));
  const auto right = at::randn({3, d, d});
  const auto loss = stale_loss(right, gx, gy);
  ASSERT_EQ(loss.sizes(), at::IntArrayRef({3, d + 1}));
  for (const int64_t r : {1, 5, 12}) {
    const auto refit = update_basis(right.narrow(2, 0, r), gx, gy, 0);  // the left half alone
    const auto expected = tail_loss(refit, gx, gy).select(1, r);
    EXPECT_LT(((loss.select(1, r) - expected).abs() / loss.select(1, 0)).max().item<double>(), 1e-5)
        << "rank " << r;
    const auto updated = tail_loss(update_basis(right.narrow(2, 0, r), gx, gy, 2), gx, gy)
                             .select(1, r);
    EXPECT_TRUE((updated <= loss.select(1, r) + 1e-5 * loss.select(1, 0)).all().item<bool>())
        << "rank " << r;
  }
  EXPECT_LT((loss.select(1, 5) / loss.select(1, 0)).max().item<double>(), 1);
  EXPECT_GT((loss.select(1, 5) / loss.select(1, 0)).min().item<double>(), 0.01);
}

TEST(PairGrams, WeighKeysByTheAttentionThatRestsOnThem) {
  at::manual_seed(9);
  const int64_t heads = 4, groups = 2, length = 40, d = 8;
  const auto q = at::randn({1, heads, length, d}), k = 2 * at::randn({1, groups, length, d}),
             v = at::randn({1, groups, length, d});
  const BlockTree tree(length, {8, 3});  // blocks from tokens 3, 11, 19, 27, 35
  const auto mass = attention_mass(q, k, tree);
  ASSERT_EQ(mass.sizes(), at::IntArrayRef({1, groups, 4, 8}));
  EXPECT_TRUE(at::allclose(mass.sum(3), at::full({1, groups, 4}, 8.0)));
  const auto mean_query = [&](int64_t head) { return q[0][head].narrow(0, 11, 8).mean(0); };
  const auto share = [&](int64_t head) {
    return at::softmax(at::mv(k[0][1].narrow(0, 11, 8), mean_query(head)) / std::sqrt(8.0), 0);
  };
  const auto expected = 8 * 0.9 * 0.5 * (share(2) + share(3)) +
                        0.1;  // of the second block in the second group
  EXPECT_TRUE(at::allclose(mass[0][1][1], expected, 1e-5, 1e-6));
  EXPECT_GT((mass.max() / mass.min()).item<double>(), 5);

  const PairGrams grams = pair_grams(q, k, v, tree, mass);
  const auto rows_of_block = [&](const at::Tensor& x) {
    return x[0][1].narrow(0, 19, 8).to(at::kDouble);
  };  // third block: second pair of level 0
  const auto weighted = [&](const at::Tensor& x) {
    return at::matmul((x * mass[0][1][2].unsqueeze(1)).t(), x);
  };
  EXPECT_TRUE(at::allclose(grams.keys[0][1][1], weighted(rows_of_block(k)), 1e-5, 1e-4));
  EXPECT_TRUE(at::allclose(grams.values[0][1][1], weighted(rows_of_block(v)), 1e-5, 1e-4));
  EXPECT_TRUE(grams.queries.equal(pair_grams(q, k, v, tree).queries));
}

// float32 on a CPU takes a kernel, float64 PyTorch's products.
TEST(PairGrams, KernelAndGeneralPathAgree) {
  at::manual_seed(14);
  const int64_t heads = 6, groups = 3, d = 48;
  for (const auto& [length, near_block] :
       {std::pair<int64_t, int64_t>(700, 32),
        {1300, 300}}) {  // odd numbers of blocks; blocks of several chunks
    SCOPED_TRACE(length);
    const BlockTree tree(length, {near_block, 3});
    const auto q = at::randn({2, length, heads, d})
                       .transpose(1, 2);  // tokens first, as a model's projections leave them
    const auto k = at::randn({2, groups, length, d}), v = at::randn({2, groups, length, d});
    const auto mass = attention_mass(q, k, tree);
    const auto wide = [](const at::Tensor& x) { return x.to(at::kDouble); };
    const PairGrams kernel = pair_grams(q, k, v, tree, mass),
                    general = pair_grams(wide(q), wide(k), wide(v), tree, wide(mass));
    for (const auto& [a, b] : {std::pair(kernel.queries, general.queries),
                               {kernel.keys, general.keys},
                               {kernel.values, general.values}}) {
      ASSERT_EQ(a.sizes(), b.sizes());
      EXPECT_LT(((a - b).norm() / b.norm()).item<double>(), 1e-6);
      EXPECT_TRUE(a.equal(a.transpose(3, 4)));
    }
    const auto w_o = at::randn({70, heads * d});
    EXPECT_TRUE(
        at::allclose(output_gram(w_o, groups, d), output_gram(wide(w_o), groups, d), 1e-5, 1e-4));
  }
}

TEST(OutputGram, SumsOverTheHeadsOfAGroup) {
  at::manual_seed(8);
  const auto w_o = at::randn({10, 4 * 3}, at::kDouble);
  const auto g = output_gram(w_o, 2, 3);
  const auto head = [&](int64_t h) { return w_o.narrow(1, 3 * h, 3); };
  EXPECT_TRUE(at::allclose(
      g[1], at::matmul(head(2).t(), head(2)) + at::matmul(head(3).t(), head(3)), 1e-5, 1e-5));
}

}  // namespace
}  // namespace drrl
