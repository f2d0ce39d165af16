#include "core/attention/certificate.h"

#include <gtest/gtest.h>

#include "core/attention/lowrank_attention.h"
#include "core/attention/reference.h"
#include "core/attention/rows.h"
#include "core/linalg/basis.h"
#include "core/linalg/gram.h"

namespace drrl {
namespace {

struct Case {
  const char* what;
  int64_t batch, heads, groups, length, d;
  Geometry geometry;
  std::vector<Ranks> ranks;  // dealt out in turn over the items
  double query_scale = 1;
  bool spike = false;  // one far key that takes all weight, with a huge value
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.what;
}

struct Inputs {
  at::Tensor q, k, v, w_o;
};

Inputs make_inputs(const Case& c) {
  at::manual_seed(21);
  const auto mix = at::matmul(at::diag(at::logspace(0, -1.5, c.d, 10.0, at::kDouble)),
                              at::randn({c.d, c.d}, at::kDouble));
  const auto make = [&](int64_t heads) {
    return at::matmul(at::randn({c.batch, heads, c.length, c.d}, at::kDouble), mix);
  };
  Inputs in{make(c.heads) * c.query_scale, make(c.groups), make(c.groups),
            at::randn({24, c.heads * c.d}, at::kDouble)};
  if (c.spike) {
    in.k.select(2, c.geometry.sink_tokens + 3).mul_(30);
    in.v.select(2, c.geometry.sink_tokens + 3).mul_(50);
    in.k.narrow(2, c.geometry.sink_tokens + 5, 4)
        .copy_(in.k.select(2, c.geometry.sink_tokens + 5).unsqueeze(2));  // equal keys
  }
  return in;
}

at::Tensor value_metric(const Case& c, const Inputs& in, const BlockTree& tree) {
  return output_gram(in.w_o, c.groups, c.d)
      .unsqueeze(1)
      .expand({c.batch, c.groups, tree.num_pairs(), c.d, c.d})
      .reshape({-1, c.d, c.d});
}

c10::intrusive_ptr<LowRankPlan> make_plan(const Case& c, const Inputs& in) {
  const BlockTree tree(c.length, c.geometry);
  const PairGrams grams = pair_grams(in.q, in.k, in.v, tree);
  const auto keys = grams.keys.flatten(0, 2);
  const Basis scores = solve_basis(grams.queries.flatten(0, 2), keys);
  const Basis values = solve_basis(grams.values.flatten(0, 2), value_metric(c, in, tree));
  std::vector<Ranks> ranks;
  auto residual = at::zeros({keys.size(0), c.d, std::min(kResidualColumns, c.d)});
  for (int64_t i = 0; i < keys.size(0); ++i) {
    ranks.push_back(c.ranks[static_cast<size_t>(i) % c.ranks.size()]);
    const auto columns = [&](const at::Tensor& x) {
      return x.slice(0, i, i + 1).narrow(2, 0, ranks.back().qk);
    };
    residual[i] = residual_factor(
        {columns(scores.left), columns(scores.right), {}}, keys.slice(0, i, i + 1),
        at::full({1}, static_cast<double>(c.geometry.near_block), at::kDouble))[0];
  }
  return c10::make_intrusive<LowRankPlan>(tree, ranks, scores, values, residual);
}

// Of all rows that see far pairs: the largest true error / bound, and the largest deviation of the
// scores' certificate from their true error.
struct Worst {
  double output = 0, eq9 = 0, scores = 0, inexact = 0;
};

ExactEntries made_exact_by(const Inputs& in, const c10::intrusive_ptr<LowRankPlan>& plan) {
  FarServed served;
  lowrank_attention(in.q, in.k, in.v, plan, &served);
  return served.exact;
}

// `certified` and `made_exact` say what the certificate takes to have been served; what really is
// served is `plan`.
Worst check(const Case& c, const Inputs& in, const c10::intrusive_ptr<LowRankPlan>& plan,
            const LowRankPlan& certified, const ExactEntries& made_exact) {
  const BlockTree& tree = plan->tree;
  const FarErrors far = far_errors(certified, in.k, in.v);
  const auto out = reference::lowrank_attention(in.q, in.k, in.v, *plan),
             exact = reference::exact_attention(in.q, in.k, in.v);
  Worst worst;
  const auto most = [](const at::Tensor& true_error, const at::Tensor& bound) {
    const auto error = at::where(true_error < 1e-9, at::zeros_like(true_error),
                                 true_error);  // what is rounding of nothing
    return (error / bound.clamp_min(1e-300)).max().item<double>();
  };
  for (int64_t s = 0; s < c.batch * c.groups; ++s) {
    const int64_t b = s / c.groups, group = s % c.groups, per_group = c.heads / c.groups;
    for (int64_t block = 1; block < tree.num_blocks(); ++block) {
      const int64_t begin = tree.sinks() + block * c.geometry.near_block,
                    end = std::min(c.length, begin + c.geometry.near_block);
      const auto rows_of = [&](const at::Tensor& x) {
        return x[b].narrow(0, group * per_group, per_group).slice(1, begin, end).flatten(0, 1);
      };
      const auto rows = ((at::arange(s * per_group, (s + 1) * per_group) * c.length).unsqueeze(1) +
                         at::arange(begin, end))
                            .flatten();
      const RowScores row = row_scores(*plan, made_exact, rows_of(in.q), rows, in.k[b][group],
                                       block, s * tree.num_pairs());
      const auto values = in.v[b][group].slice(0, 0, end), weights = at::softmax(row.served, 1);
      EXPECT_TRUE(
          at::allclose(at::matmul(at::softmax(row.exact, 1), values), rows_of(exact), 1e-9, 1e-9));
      const ServedPairs here = served_pairs(row, weights, seen_pairs(tree, block));
      const ServedRows served{rows_of(in.q),
                              rows_of(out),
                              here.mass,
                              here.norm,
                              here.largest,
                              here.spared,
                              at::linalg_svdvals(values)[0].item<double>(),
                              values.norm(2, 1).max().item<double>()};
      const RowBounds bounds = certify_rows(far, s * tree.num_pairs() + here.pairs, served);
      const auto output_error = (rows_of(out) - rows_of(exact)).norm(2, 1);
      worst.output = std::max(worst.output, most(output_error, bounds.output));
      worst.eq9 = std::max(worst.eq9, most(output_error, bounds.eq9));
      worst.scores = std::max(worst.scores, most(here.error, bounds.scores));
      worst.inexact = std::max(
          worst.inexact,
          ((here.error - bounds.scores).abs() / (0.1 + here.error)).max().item<double>());
    }
  }
  return worst;
}

class Certificate : public ::testing::TestWithParam<Case> {};

const Case kCases[] = {
    {"grouped heads, short last block", 1, 6, 3, 200, 32, {32, 4}, {{16, 16}}},
    {"batch, one head a group", 2, 4, 4, 132, 32, {32, 4}, {{8, 8}}},
    {"no sinks, r < r_v", 1, 4, 2, 150, 16, {32, 0}, {{4, 8}}},
    {"every item its own ranks",
     1,
     6,
     3,
     300,
     32,
     {16, 1},
     {{8, 8}, {16, 32}, {32, 16}, {32, 32}, {4, 12}}},
    {"scores low", 2, 6, 2, 260, 16, {64, 4}, {{8, 16}}},
    {"values low", 1, 6, 2, 260, 16, {64, 4}, {{16, 8}}},
    {"flat softmax", 1, 4, 2, 300, 32, {32, 4}, {{8, 16}}, 0.02},
    {"sharp softmax", 1, 4, 2, 300, 32, {32, 4}, {{8, 16}}, 10},
    {"a far key takes all weight and has a huge value",
     1,
     4,
     2,
     200,
     16,
     {32, 2},
     {{4, 4}},
     1,
     true},
    {"the same with small queries", 1, 4, 2, 200, 16, {32, 0}, {{2, 12}}, 0.1, true},
    {"blocks shorter than d", 1, 2, 1, 61, 16, {8, 2}, {{4, 6}}},
    {"gates: some entries exact, all, none",
     2,
     6,
     3,
     300,
     32,
     {32, 4},
     {{8, 8, 0.02F}, {4, 12, 0.005F}, {32, 8, 0.01F}, {8, 8, 0}, {16, 16, 0.002F}, {8, 32}}},
    {"gates under a far key that takes all weight",
     1,
     4,
     2,
     200,
     16,
     {32, 2},
     {{4, 4, 0.01F}},
     1,
     true},
};

TEST_P(Certificate, HoldsForEveryRow) {
  const Case& c = GetParam();
  const Inputs in = make_inputs(c);
  const auto plan = make_plan(c, in);
  const Worst worst = check(c, in, plan, *plan, made_exact_by(in, plan));
  EXPECT_LE(worst.output, 1 + 1e-9);
  EXPECT_LE(worst.eq9, 1 + 1e-9);
  EXPECT_LE(worst.scores, 1 + 1e-9);
  EXPECT_LE(worst.inexact, 1e-3) << "the scores' certificate is exact";
  EXPECT_GT(worst.output, 1e-3) << "a bound without any grip";
}

TEST_P(Certificate, TheLossIsThatOfTheItemsOwnRank) {
  const Case& c = GetParam();
  const Inputs in = make_inputs(c);
  const auto plan = make_plan(c, in);
  const BlockTree& tree = plan->tree;
  const FarErrors far = far_errors(*plan, in.k, in.v);
  for (const PairRun& run : tree.runs()) {
    const auto q = query_rows(in.q, c.groups, run), k = key_rows(in.k, run),
               v = key_rows(in.v, run);
    for (int64_t i = 0; i < q.size(0); ++i) {
      const int64_t item = i / run.count * tree.num_pairs() + run.first_pair + i % run.count;
      const Ranks& ranks = plan->ranks[static_cast<size_t>(item)];
      const auto gram = [](const at::Tensor& x) { return at::matmul(x.t(), x).unsqueeze(0); };
      const auto one = [&](const at::Tensor& x) { return x.slice(0, item, item + 1); };
      const auto compare = [&](const Basis& basis, FarKind kind, int64_t rank, const at::Tensor& x,
                               const at::Tensor& gram_y, const at::Tensor& y) {
        const auto p_x = basis.left[item].narrow(1, 0, rank).to(at::kDouble),
                   p_y = basis.right[item].narrow(1, 0, rank).to(at::kDouble);
        const auto product = at::matmul(x, y.t());
        const double energy = product.pow(2).sum().item<double>();
        const double truth = rank == c.d ? 0.0
                                         : (product -
                                            at::matmul(at::matmul(x, p_x), at::matmul(y, p_y).t()))
                                               .pow(2)
                                               .sum()
                                               .item<double>();
        const FarLoss loss = far_loss(one(dropped(*plan, kind, c.d)), gram(x), gram_y);
        EXPECT_NEAR(loss.loss.item<double>(), truth, 1e-9 * energy);
        EXPECT_NEAR(loss.energy.item<double>(), energy, 1e-9 * energy);
        if (rank < c.d) {
          EXPECT_NEAR(loss.loss.item<double>(),
                      tail_loss({one(basis.left), one(basis.right), {}}, gram(x), gram_y)[0][rank]
                          .item<double>(),
                      1e-9 * energy);
        }
      };
      compare(plan->scores, FarKind::kScores, ranks.qk, q[i], one(far.key_gram), k[i]);
      const int64_t group = i / run.count % c.groups, per_group = c.heads / c.groups;
      // Rows of W_O of the group's heads, one below the other: || V (I - P_v P_o^T) W_O^T ||.
      const auto w_o = in.w_o.unflatten(1, {c.heads, c.d})
                           .narrow(1, group * per_group, per_group)
                           .flatten(0, 1);
      compare(plan->values, FarKind::kValues, ranks.v, v[i], gram(w_o), w_o);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Certificate, ::testing::ValuesIn(kCases));

// A certificate that takes more columns to be served than are must be caught.
TEST(CertificateCheck, SeesAWrongBound) {
  const Case& c = kCases[0];
  const Inputs in = make_inputs(c);
  const auto plan = make_plan(c, in);
  auto fewer = c10::make_intrusive<LowRankPlan>(plan->tree, plan->ranks, plan->scores, plan->values,
                                                plan->residual);
  for (Ranks& ranks : fewer->ranks) {
    ranks.qk /= 8;
  }
  EXPECT_GT(check(c, in, fewer, *plan, {}).scores, 1.5);
  for (Ranks& ranks : fewer->ranks) {
    ranks = {c.d, 1};
  }
  auto claimed = c10::make_intrusive<LowRankPlan>(*fewer);
  for (Ranks& ranks : claimed->ranks) {
    ranks.v = c.d - 1;
  }
  EXPECT_GT(check(c, in, fewer, *claimed, {}).output, 1.5);

  auto all_exact = c10::make_intrusive<LowRankPlan>(*plan);
  for (Ranks& ranks : all_exact->ranks) {
    ranks.gate = 0;
  }
  // But no gate was there when it was served.
  EXPECT_GT(check(c, in, plan, *plan, made_exact_by(in, all_exact)).output, 1.5);
}

TEST(SubspaceChange, StaysWithinWeylAndDavisKahan) {
  at::manual_seed(22);
  const int64_t n = 5, d = 16;
  const auto gram = [&](int64_t rows) {
    const auto x = at::matmul(
        at::randn({n, rows, d}, at::kDouble) * at::logspace(0, -2, d, 10.0, at::kDouble),
        at::randn({d, d}, at::kDouble));
    return at::matmul(x.transpose(1, 2), x);
  };
  const auto gram_q = gram(40), gram_k = gram(50);
  const std::vector<Ranks> ranks = {{4, 16}, {8, 16}, {12, 16}, {1, 16}, {16, 16}};
  const Basis own = solve_basis(gram_q, gram_k);
  for (const double noise : {0.0, 1e-3, 1.0}) {
    const SubspaceChange change = subspace_change(
        own.right + noise * at::randn({n, d, d}) * own.right.norm() / 16, ranks, gram_q, gram_k);
    const auto some = [](const at::Tensor& x) { return x.narrow(0, 0, 4); };
    EXPECT_TRUE((some(change.shift) <= some(change.weyl) * (1 + 1e-6)).all().item<bool>())
        << noise << change.shift << change.weyl;
    EXPECT_TRUE(
        (some(change.sine) <= some(change.davis_kahan) * (1 + 1e-6) + 1e-6).all().item<bool>())
        << noise << change.sine << change.davis_kahan;
    EXPECT_TRUE(change.sine.isnan().nonzero().equal(at::full({1, 1}, 4, at::kLong)))
        << "the exact item";
    if (noise == 0) {
      EXPECT_LT(some(change.sine).max().item<double>(), 1e-3);
    }
  }
}

}  // namespace
}  // namespace drrl
