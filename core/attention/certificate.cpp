#include "core/attention/certificate.h"

#include <cmath>
#include <limits>

#include <ATen/Parallel.h>

#include "core/attention/rows.h"
#include "core/linalg/basis.h"
#include "core/linalg/eigensolver.h"

namespace drrl {
namespace {

constexpr double kLift = 1e-8;  // delta, relative to the mean diagonal of M G_k M^T
constexpr double
    kRounding = 1e-13;  // of x^T G_k x in float64, relative to G_k's mean diagonal and || x ||^2
constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor wide(const at::Tensor& x) {
  return x.detach().to(at::kCPU, at::kDouble);
}

// The largest singular values of matrices with these Grams: [N, d, d] -> [N].
at::Tensor spectral_norm(const at::Tensor& gram) {
  return std::get<0>(batched_eigh(gram)).select(1, -1).clamp_min(0).sqrt();
}

// z^T G z of rows z [P, m, d] in metrics G [P, d, d]: [P, m].
at::Tensor form(const at::Tensor& z, const at::Tensor& gram) {
  return (at::matmul(z, gram) * z).sum(2).clamp_min(0);
}

// 0 * inf is no bound.
at::Tensor or_infinity(const at::Tensor& x) {
  return at::nan_to_num(x, kInfinity, kInfinity);
}

}  // namespace

at::Tensor dropped(const LowRankPlan& plan, FarKind kind, int64_t head_dim) {
  const auto n = static_cast<int64_t>(plan.ranks.size());
  const Basis& basis = kind == FarKind::kScores ? plan.scores : plan.values;
  auto result = at::zeros({n, head_dim, head_dim}, at::kDouble);
  for (int64_t i = 0; i < n; ++i) {
    const Ranks& ranks = plan.ranks[static_cast<size_t>(i)];
    const int64_t rank = kind == FarKind::kScores ? ranks.qk : ranks.v;
    if (rank < head_dim) {
      const auto columns = [&](const at::Tensor& x) { return wide(x[i].narrow(1, 0, rank)); };
      result[i] = at::eye(head_dim, at::kDouble) -
                  at::matmul(columns(basis.left), columns(basis.right).t());
    }
  }
  return result;
}

FarLoss far_loss(const at::Tensor& dropped, const at::Tensor& gram_x, const at::Tensor& gram_y) {
  const auto lost = at::matmul(at::matmul(dropped.transpose(1, 2), gram_x), dropped);
  return {(lost * gram_y).sum({1, 2}).clamp_min(0), (gram_x * gram_y).sum({1, 2})};
}

std::vector<SeenPair> seen_pairs(const BlockTree& tree, int64_t block) {
  TORCH_CHECK(block >= 0 && block < tree.num_blocks(), "seen_pairs: no block ", block, " of ",
              tree.num_blocks());
  std::vector<SeenPair> pairs;
  for (int64_t level = 0; block >> level != 0; ++level) {
    if ((block >> level) % 2 == 1) {  // in a right node of this level
      const int64_t i = block >> (level + 1), rows = tree.geometry().near_block << level;
      pairs.push_back({tree.pair_index(level, i), level, tree.sinks() + 2 * i * rows, rows});
    }
  }
  return pairs;
}

FarErrors far_errors(const LowRankPlan& plan, const at::Tensor& k, const at::Tensor& v) {
  at::NoGradGuard no_grad;
  const int64_t d = k.size(3), pairs = plan.tree.num_pairs(), sequences = k.size(0) * k.size(1);
  TORCH_CHECK(k.dim() == 4 && k.sizes() == v.sizes() && k.size(2) == plan.tree.sequence_length() &&
                  static_cast<int64_t>(plan.ranks.size()) == sequences * pairs,
              "far_errors: k ", k.sizes(), ", v ", v.sizes(), " for a plan of ", plan.ranks.size(),
              " items and ", plan.tree.sequence_length(), " tokens");
  const auto k_wide = wide(k), v_wide = wide(v);
  const auto scores = dropped(plan, FarKind::kScores, d),
             lost_values = dropped(plan, FarKind::kValues, d);
  std::vector<std::vector<at::Tensor>> parts(10);  // per field, [B G, count, ..] of each run
  for (const PairRun& run : plan.tree.runs()) {
    const auto keys = key_rows(k_wide, run), values = key_rows(v_wide, run);  // [B G count, n, d]
    const auto of_run = [&](const at::Tensor& x) {
      return x.view({sequences, pairs, d, d}).narrow(1, run.first_pair, run.count).flatten(0, 1);
    };
    const auto gram_of = [](const at::Tensor& x) { return at::matmul(x.transpose(1, 2), x); };
    const auto lost_keys = at::matmul(keys, of_run(scores).transpose(1, 2));
    const auto lost_gram = gram_of(lost_keys);
    const auto lift = lost_gram.diagonal(0, 1, 2).mean(1) * kLift + 1e-300;
    const auto [root, info] = at::linalg_cholesky_ex(
        lost_gram + at::diag_embed(lift.unsqueeze(1).expand({-1, d})));
    const auto whitened = at::linalg_solve_triangular(root, lost_keys.transpose(1, 2),
                                                      /*upper=*/false);  // [.., d, n]
    const auto leverage = at::where(info == 0, whitened.pow(2).sum(1).amax(1), at::ones_like(lift))
                              .clamp_max(1);
    const auto mean = values.mean(1);
    const auto centred = values - mean.unsqueeze(1);
    const auto lost = at::matmul(values, of_run(lost_values));
    const auto norm = [&](const at::Tensor& x) { return spectral_norm(gram_of(x)); };
    const auto longest = [](const at::Tensor& x) {
      return at::linalg_vector_norm(x, 2, {2}).amax(1);
    };
    const at::Tensor fields[] = {at::full_like(lift, static_cast<double>(run.key_rows)),
                                 gram_of(keys),
                                 keys.sum(1),
                                 lift,
                                 leverage,
                                 mean,
                                 longest(centred),
                                 norm(centred),
                                 norm(lost),
                                 longest(lost)};
    for (size_t i = 0; i < parts.size(); ++i) {
      parts[i].push_back(fields[i].unflatten(0, {sequences, run.count}));
    }
  }
  const auto all = [&](size_t i) { return at::cat(parts[i], 1).flatten(0, 1); };
  at::Tensor residual = at::zeros({sequences * pairs, d, 1}, at::kDouble);
  if (plan.residual.defined()) {  // not defined where the rank is d
    residual = at::where((scores != 0).flatten(1).any(1).view({-1, 1, 1}), wide(plan.residual),
                         residual);
  }
  return {scores, residual, all(0), all(1), all(2), all(3),
          all(4), all(5),   all(6), all(7), all(8), all(9)};
}

RowBounds certify_rows(const FarErrors& far, const at::Tensor& items, const ServedRows& rows) {
  at::NoGradGuard no_grad;
  const auto of = [&](const at::Tensor& x) { return x.index_select(0, items); };
  const auto a_pair = [&](const at::Tensor& x) { return of(x).unsqueeze(1); };  // [P] -> [P, 1]
  const double d = static_cast<double>(rows.queries.size(1));
  const auto x = at::matmul(rows.queries, of(far.scores)) / std::sqrt(d);  // [P, m, d]
  const auto c = at::matmul(rows.queries, of(far.residual)).pow(2).sum(2);
  const auto metric = of(far.key_gram);
  const auto square = form(x, metric) + kRounding *
                                            metric.diagonal(0, 1, 2).mean(1, /*keepdim=*/true) *
                                            x.pow(2).sum(2);
  const auto e = (square - 2 * c * (x * a_pair(far.key_sum)).sum(2) + a_pair(far.keys) * c.pow(2) -
                  rows.spared)
                     .clamp_min(0)
                     .sqrt();
  const auto a = ((square + a_pair(far.lift) * (rows.queries.pow(2).sum(1) / d)) *
                  a_pair(far.leverage))
                     .sqrt();

  // 1. Before serving.
  const auto total = e.pow(2).sum(0).sqrt();
  const auto value_term = of(far.value_loss).amax(0);
  const auto interval = at::minimum(std::sqrt(2.0) * total,
                                    (c + a).amax(0) + (a - c).clamp_min(0).amax(0));
  const auto eq9 = total * (0.5 * rows.value_norm) + value_term;
  const auto before = at::minimum(eq9, 2 * (interval / 4).tanh() * rows.value_radius + value_term);

  // 2. After serving. psi and (e^y - 1) / y grow, so a larger y is safe.
  const auto y = (a - c).clamp_min(1e-3);
  const auto slope = y.expm1() / y, psi = (y.expm1() - y) / y.pow(2);
  const auto linear = rows.norm * e;
  const auto moved = at::minimum(
      at::minimum(or_infinity(slope * linear), or_infinity(linear + psi * rows.largest * e.pow(2))),
      or_infinity(rows.mass * y.expm1().clamp_min(1)));  // at least sum_j w'_j | f_j - 1 |
  const auto moved_norm = at::minimum(or_infinity(slope * rows.largest * e), moved);
  const auto away = at::linalg_vector_norm(a_pair(far.value_mean) - rows.out, 2, {2});
  const auto scores = at::minimum(moved * a_pair(far.value_radius),
                                  moved_norm * a_pair(far.value_spread)) +
                      moved * away;
  const auto values = at::minimum(rows.norm * a_pair(far.value_loss),
                                  rows.mass * a_pair(far.value_loss_row));
  const auto falls = at::minimum(c + a, linear / rows.mass.clamp_min(1e-300));
  const auto z = 1 - rows.mass.sum(0) + (rows.mass * (-falls).exp()).sum(0);
  const auto after = or_infinity((scores + values).sum(0) / z.clamp_min(0));

  // 3. Whatever was served.
  const auto hull = at::linalg_vector_norm(rows.out, 2, {1}) + rows.value_radius;
  return {e, eq9, at::minimum(at::minimum(before, after), hull)};
}

RowScores row_scores(const LowRankPlan& plan, const ExactEntries& made_exact,
                     const at::Tensor& queries, const at::Tensor& rows, const at::Tensor& keys,
                     int64_t block, int64_t first_item) {
  at::NoGradGuard no_grad;
  const BlockTree& tree = plan.tree;
  const int64_t end = std::min(tree.sequence_length(),
                               tree.sinks() + (block + 1) * tree.geometry().near_block),
                d = keys.size(1);
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  const auto q = wide(queries), k = wide(keys.narrow(0, 0, end));
  auto exact = at::matmul(q, k.t()) * scale;
  auto low = exact.clone();
  for (const SeenPair& seen : seen_pairs(tree, block)) {
    const int64_t item = first_item + seen.pair, rank = plan.ranks[static_cast<size_t>(item)].qk;
    if (rank == d) {
      continue;
    }
    const auto down = [&](const at::Tensor& x, const at::Tensor& basis) {
      return at::matmul(x, wide(basis[item].narrow(1, 0, rank)));
    };
    auto far = at::matmul(down(q, plan.scores.left),
                          down(k.narrow(0, seen.key_begin, seen.key_rows), plan.scores.right).t()) *
               scale;
    if (plan.residual.defined()) {
      far += at::matmul(q, wide(plan.residual[item])).pow(2).sum(1, /*keepdim=*/true);
    }
    low.narrow(1, seen.key_begin, seen.key_rows).copy_(far);
  }
  auto spared = at::zeros(exact.sizes(), at::kBool);
  for (int64_t i = 0; made_exact.defined() && i < rows.size(0); ++i) {
    const int64_t row = rows[i].item<int64_t>(), first = made_exact.begin()[row].item<int64_t>(),
                  last = made_exact.begin()[row + 1].item<int64_t>();
    spared[i].index_fill_(0, made_exact.keys().slice(0, first, last).to(at::kLong), 1);
  }
  const auto later = at::arange(end) > rows.remainder(tree.sequence_length()).unsqueeze(1);
  const auto causal = [&](const at::Tensor& x) { return x.masked_fill(later, -kInfinity); };
  return {causal(exact), causal(at::where(spared, exact, low)), causal(low), spared};
}

ServedPairs served_pairs(const RowScores& scores, const at::Tensor& weights,
                         const std::vector<SeenPair>& pairs) {
  std::vector<int64_t> numbers;
  std::vector<at::Tensor> error, mass, norm, largest, spared;
  for (const SeenPair& pair : pairs) {
    numbers.push_back(pair.pair);
    const auto keys_of = [&](const at::Tensor& x) {
      return x.narrow(1, pair.key_begin, pair.key_rows);
    };
    const auto exact = keys_of(scores.spared), left = keys_of(weights).masked_fill(exact, 0);
    error.push_back(at::linalg_vector_norm(keys_of(scores.served) - keys_of(scores.exact), 2, {1}));
    mass.push_back(left.sum(1));
    norm.push_back(at::linalg_vector_norm(left, 2, {1}));
    largest.push_back(left.amax(1));
    spared.push_back((keys_of(scores.low) - keys_of(scores.exact))
                         .masked_fill(exact.logical_not(), 0)
                         .pow(2)
                         .sum(1));
  }
  return {at::tensor(numbers, at::kLong),
          at::stack(error),
          at::stack(mass),
          at::stack(norm),
          at::stack(largest),
          at::stack(spared)};
}

SubspaceChange subspace_change(const at::Tensor& start, const std::vector<Ranks>& ranks,
                               const at::Tensor& gram_q, const at::Tensor& gram_k) {
  at::NoGradGuard no_grad;
  const int64_t n = gram_q.size(0), d = gram_q.size(1);
  TORCH_CHECK(static_cast<int64_t>(ranks.size()) == n && start.sizes() == gram_q.sizes() &&
                  gram_q.sizes() == gram_k.sizes(),
              "subspace_change: ", ranks.size(), " ranks, start ", start.sizes(), ", Grams ",
              gram_q.sizes(), " and ", gram_k.sizes());
  const auto root = [](const at::Tensor& gram) {  // R with R R^T = G
    const auto [values, vectors] = batched_eigh(gram);
    return vectors * values.clamp_min(0).sqrt().unsqueeze(1);
  };
  const auto root_q = root(gram_q), root_k = root(gram_k);
  auto figures = at::full({4, n}, std::numeric_limits<double>::quiet_NaN(), at::kDouble);
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_grad_in_thread;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = ranks[static_cast<size_t>(i)].qk;
      if (r == d) {
        continue;
      }
      const Basis stale = update_basis(start.slice(0, i, i + 1).narrow(2, 0, r),
                                       gram_q.slice(0, i, i + 1), gram_k.slice(0, i, i + 1), 0);
      const auto own = at::matmul(root_q[i].t(), root_k[i]);  // as Q K^T up to rotations
      const auto through = at::matmul(at::matmul(root_q[i].t(), wide(stale.left[0])),
                                      at::matmul(wide(stale.right[0]).t(), root_k[i]));
      const auto [u, sigma, vh] = at::linalg_svd(own, /*full_matrices=*/false);
      const auto [u_stale, sigma_stale, vh_stale] = at::linalg_svd(through,
                                                                   /*full_matrices=*/false);
      const double change = at::linalg_svdvals(own - through)[0].item<double>(),
                   first = sigma[0].item<double>();
      const auto cosines = at::linalg_svdvals(
          at::matmul(vh.narrow(0, 0, r), vh_stale.narrow(0, 0, r).t()));
      const double cosine = std::min(1.0, cosines[r - 1].item<double>());
      const double values[] = {
          change / first, (sigma - sigma_stale).abs().max().item<double>() / first,
          change / sigma[r - 1].item<double>(), std::sqrt(1 - cosine * cosine)};
      for (int64_t j = 0; j < 4; ++j) {
        figures[j][i].fill_(values[j]);
      }
    }
  });
  return {figures[0], figures[1], figures[2], figures[3]};
}

}  // namespace drrl
