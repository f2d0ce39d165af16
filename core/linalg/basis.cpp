#include "core/linalg/basis.h"

#include <algorithm>
#include <atomic>
#include <map>

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "core/cpu/basis_kernel.h"
#include "core/cpu/tasks.h"
#ifdef DRRL_WITH_CUDA
#include "core/cuda/basis.h"
#endif
#include "core/attention/rows.h"
#include "core/error.h"
#include "core/linalg/eigensolver.h"

namespace drrl {
namespace {

constexpr double kNegligible = 1e-7;  // relative singular value below which a direction is noise of
                                      // the float32 Grams
constexpr double
    kNothing = 1e-100;  // singular value that is there only because a Gram of zeros is lifted
constexpr double kFirstJitter = 1e-12;  // relative to the mean diagonal
constexpr double kLargestJitter = 1;
constexpr UpdateSettings kUpdateSettings;

// [rows, columns] of random_sign.
at::Tensor random_signs(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  std::vector<double> signs;
  for (int64_t i = 0; i < rows * columns; ++i) {
    signs.push_back(random_sign(i));
  }
  return on_device(signs, options.device()).to(options.dtype()).view({rows, columns});
}

// Lower Cholesky factors of G + jitter I, for each matrix with the smallest jitter that works (a
// Gram of fewer rows than columns, or one rounded in float32, is only semidefinite). Matrix by
// matrix: what one pair needs must not touch another's basis.
at::Tensor shifted_cholesky(const at::Tensor& gram) {
  const auto mean_diagonal = gram.diagonal(0, 1, 2).mean(-1, /*keepdim=*/true).clamp_min(1e-300);
  const auto shifted = [&](const at::Tensor& which, double jitter) {
    auto result = gram.index_select(0, which);
    result.diagonal(0, 1, 2).add_(mean_diagonal.index_select(0, which) * jitter);
    return result;
  };
  auto pending = at::arange(gram.size(0), gram.options().dtype(at::kLong));
  auto factors = at::empty_like(gram);
  for (double jitter = kFirstJitter; jitter <= kLargestJitter; jitter *= 100) {
    auto [factor, info] = at::linalg_cholesky_ex(shifted(pending, jitter));
    factors.index_copy_(0, pending, factor);
    pending = pending.index_select(0, info.nonzero().flatten());
    if (pending.numel() == 0) {
      return factors;
    }
  }
  raise(ErrorKind::kNumerics,
        "basis: Cholesky factorization of a Gram matrix failed for every jitter up to ",
        kLargestJitter,
        " of its mean diagonal; the matrix is not positive semidefinite: its smallest diagonal "
        "entry is ",
        gram.index_select(0, pending).diagonal(0, 1, 2).min().item<double>(),
        ", its largest entry ", gram.index_select(0, pending).abs().max().item<double>());
}

// And the items some of whose columns are zero, [N] bool.
std::pair<Basis, at::Tensor> solve_once(const at::Tensor& gram_x, const at::Tensor& gram_y) {
  const auto c = shifted_cholesky(gram_y);
  const auto gram_x_c = at::matmul(gram_x, c);
  auto product = at::matmul(c.transpose(1, 2), gram_x_c);
  product = (product + product.transpose(1, 2)) * 0.5;
  auto [squared, vectors] = batched_eigh(product);
  squared = squared.flip(1).clamp_min(0);
  vectors = vectors.flip(2);
  const auto sigma = squared.sqrt();
  const auto keep = sigma > (sigma.narrow(1, 0, 1) * kNegligible).clamp_min(kNothing);
  const auto root = at::where(keep, sigma.rsqrt(), at::zeros({}, sigma.options()))
                        .unsqueeze(1);  // Sigma^-1/2, [N, 1, d]
  const auto left = at::matmul(c, vectors) * root;
  const auto right = at::matmul(gram_x_c, vectors) * root.pow(3);
  return {{left.to(at::kFloat), right.to(at::kFloat), sigma}, keep.logical_not().any(1)};
}

Basis solve_batch(const at::Tensor& gram_x, const at::Tensor& gram_y) {
  auto [basis, deficient] = solve_once(gram_x, gram_y);
  if (!deficient.any().item<bool>()) {
    return basis;
  }
  // Of few rows of X: the columns that they leave go to what is best for Y, whatever other rows
  // follow. There X^T X is lifted.
  const auto items = deficient.nonzero().flatten();
  const auto mean = gram_x.diagonal(0, 1, 2).mean(-1).index_select(0, items).view({-1, 1, 1});
  const auto lifted = gram_x.index_select(0, items) +
                      mean * kUpdateSettings.first_lift * at::eye(gram_x.size(1), gram_x.options());
  const Basis filled = solve_once(lifted, gram_y.index_select(0, items)).first;
  basis.left.index_copy_(0, items, filled.left);
  basis.right.index_copy_(0, items, filled.right);
  return basis;
}

at::Tensor lengths(const at::Tensor& columns) {
  return at::linalg_vector_norm(columns, 2, {1}, /*keepdim=*/true);
}

// G p (p^T G p)^-1 for G = gram + floor I, and whether that G is definite, [n] bool: the partner of
// p that minimizes || Y^T - p' p^T Y^T ||_F for Y^T Y = G. Columns of p are scaled first, so that
// the jitter of the factorization means the same for each of them; one of zeros gets a partner of
// zeros.
std::pair<at::Tensor, at::Tensor> lifted_partner(const at::Tensor& p, const at::Tensor& gram,
                                                 const at::Tensor& trace, const at::Tensor& floor) {
  auto gram_p = at::matmul(gram, p) + floor.view({-1, 1, 1}) * p;
  const auto energy = (p * gram_p).sum(1, /*keepdim=*/true);  // p_i^T G p_i, [n, 1, r]
  const auto scale = at::where(energy > 0, energy.rsqrt(), at::zeros({}, energy.options()));
  gram_p = gram_p * scale;
  auto inner = at::matmul((p * scale).transpose(1, 2), gram_p);
  inner.diagonal(0, 1, 2).add_(
      inner.diagonal(0, 1, 2).mean(-1, /*keepdim=*/true).clamp_min(1e-300) *
      kUpdateSettings.jitter);
  const auto [factor, info] = at::linalg_cholesky_ex(inner);
  const auto partner = at::cholesky_solve(gram_p.transpose(1, 2), factor)
                           .transpose(1, 2);  // X (C C^T)^-1
  const auto explained = (partner * gram_p).sum({1, 2});
  const auto positive = at::logical_or(energy > 0, lengths(p) == 0).flatten(1).all(1);
  return {partner * scale,
          (info == 0).logical_and(positive).logical_and(
              explained <= kMostExplained * (trace + static_cast<double>(p.size(1)) * floor))};
}

// Each item's with the smallest lift that makes its Gram definite. Lifts stand above the rounding
// of Grams, so that directions without rows do not turn into noise.
at::Tensor partner(const at::Tensor& p, const at::Tensor& gram) {
  const auto trace = gram.diagonal(0, 1, 2).sum(-1),
             mean = trace / static_cast<double>(gram.size(1));
  at::Tensor result, pending;
  for (double lift = kUpdateSettings.first_lift; lift <= kUpdateSettings.largest_lift;
       lift *= 100) {
    const auto of = [&](const at::Tensor& x) {
      return pending.defined() ? x.index_select(0, pending) : x;
    };
    const auto floor = at::where(
        mean > 0, mean * lift,
        at::ones({}, mean.options()));  // without any rows the identity stands in
    const auto [some, sound] = lifted_partner(of(p), of(gram), of(trace), of(floor));
    if (result.defined()) {
      result.index_copy_(0, pending, some);
    } else {
      result = some;
      pending = at::arange(p.size(0), p.options().dtype(at::kLong));
    }
    pending = pending.masked_select(sound.logical_not());
    if (pending.numel() == 0) {
      return result;
    }
  }
  raise(ErrorKind::kNumerics, "update_basis: Gram matrix ", pending[0].item<int64_t>(), " of ",
        gram.size(0), " is far from positive semidefinite");
}

Basis update_batch(const at::Tensor& start, const at::Tensor& gram_x, const at::Tensor& gram_y,
                   int64_t steps) {
  // Columns of length one before each half: their partners' lengths follow, and none grows from
  // round to round where a Gram is deficient.
  const auto unit = [](const at::Tensor& p) { return p / lengths(p).clamp_min(1e-300); };
  const int64_t d = start.size(1), rank = start.size(2);
  auto right = start.to(at::kDouble);
  right = unit(at::where(lengths(right) == 0, random_signs(d, rank, right.options()), right));
  auto left = partner(right, gram_y);
  for (int64_t step = 0; step < steps; ++step) {
    right = unit(partner(unit(left), gram_x));
    left = partner(right, gram_y);
  }
  // Columns of equal length on both sides, so that neither projection leaves the range of a
  // half-precision float.
  const auto balance = (lengths(right) / lengths(left).clamp_min(1e-300)).sqrt();
  return {(left * balance).to(at::kFloat), (right / balance.clamp_min(1e-300)).to(at::kFloat), {}};
}

void check_shapes(const char* what, const at::Tensor& gram_x, const at::Tensor& gram_y) {
  TORCH_CHECK(
      gram_x.dim() == 3 && gram_x.size(1) == gram_x.size(2) && gram_x.sizes() == gram_y.sizes(),
      what, ": Grams ", gram_x.sizes(), " and ", gram_y.sizes(), ", expected twice [N, d, d]");
  TORCH_CHECK(gram_x.scalar_type() == at::kDouble && gram_y.scalar_type() == at::kDouble, what,
              ": Grams of ", gram_x.scalar_type(), " and ", gram_y.scalar_type(),
              ", expected Double");
}

void check_finite(const char* what, const at::Tensor& gram_x, const at::Tensor& gram_y) {
  if (!at::isfinite(gram_x).all().item<bool>() || !at::isfinite(gram_y).all().item<bool>()) {
    const auto bad = at::logical_not(at::isfinite(gram_x + gram_y).flatten(1).all(1)).nonzero();
    raise(ErrorKind::kNumerics, what, ": Gram matrix ", bad[0].item<int64_t>(), " of ",
          gram_x.size(0), " is not finite");
  }
}

void check_grams(const char* what, const at::Tensor& gram_x, const at::Tensor& gram_y) {
  check_shapes(what, gram_x, gram_y);
  check_finite(what, gram_x, gram_y);
}

using ItemsByRank = std::map<int64_t, std::vector<int64_t>>;

// Of ranks up to `most`.
ItemsByRank items_by_rank(const std::vector<int64_t>& ranks, int64_t most) {
  ItemsByRank items;
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] <= most) {
      items[ranks[i]].push_back(static_cast<int64_t>(i));
    }
  }
  return items;
}

bool kernel_fits(int64_t d, const ItemsByRank& items) {
  return std::all_of(items.begin(), items.end(),
                     [&](const auto& of) { return cpu::basis_kernel_fits(d, of.first); });
}

// Deals a batch of n small problems out over the CPU's threads: one thread a problem beats threads
// inside one factorization by far.
template <typename Work>
void for_each_share(int64_t n, const Work& work) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_grad_in_thread;
    work(begin, end);
  });
}

// update_bases by the CPU's kernel, which must fit d and the ranks, of items whose rank is at most
// `columns`, those of the result. False if one failed.
bool update_items(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y,
                  const std::vector<int64_t>& ranks, int64_t columns, int64_t steps,
                  Basis& result) {
  const int64_t n = gram_x.size(0), d = gram_x.size(1);
  const auto options = gram_x.options().dtype(at::kFloat);
  result = {at::empty({n, d, columns}, options), at::empty({n, d, columns}, options), {}};
  const auto start = right.contiguous(), x = gram_x.contiguous(), y = gram_y.contiguous();
  const auto item_of = [&](const auto* data, const at::Tensor& of, int64_t i) {
    return data + i * of.size(0) / n * of.stride(0);
  };
  std::atomic<bool> failed{false};
  cpu::for_each_task(n, 2 * cpu::update_scratch_size(d, columns), [&](int64_t i, float* scratch) {
    const int64_t rank = ranks[static_cast<size_t>(i)];
    if (rank <= columns &&
        !cpu::update_item(d, rank, steps, item_of(start.const_data_ptr<float>(), start, i),
                          start.size(2), item_of(x.const_data_ptr<double>(), x, i),
                          item_of(y.const_data_ptr<double>(), y, i), kUpdateSettings,
                          result.left.data_ptr<float>() + i * d * columns,
                          result.right.data_ptr<float>() + i * d * columns, columns,
                          reinterpret_cast<double*>(scratch))) {
      failed = true;
    }
  });
  return !failed;
}

}  // namespace

Basis update_basis(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y,
                   int64_t steps) {
  at::NoGradGuard no_grad;
  check_shapes("update_basis", gram_x, gram_y);
  TORCH_CHECK(right.dim() == 3 && right.size(0) == gram_x.size(0) &&
                  right.size(1) == gram_x.size(1) && right.size(2) >= 1 &&
                  right.size(2) <= right.size(1) && steps >= 0,
              "update_basis: a basis ", right.sizes(), " for Grams ", gram_x.sizes(), " and ",
              steps, " steps");
  const std::vector<int64_t> ranks(static_cast<size_t>(right.size(0)), right.size(2));
#ifdef DRRL_WITH_CUDA
  if (Basis result;
      gram_x.is_cuda() && update_bases_cuda(right, gram_x, gram_y, ranks, right.size(2), steps,
                                            kUpdateSettings, result)) {
    return result;
  }
#endif
  if (!gram_x.is_cuda() && right.scalar_type() == at::kFloat &&
      cpu::basis_kernel_fits(right.size(1), right.size(2))) {
    if (Basis result; update_items(right, gram_x, gram_y, ranks, right.size(2), steps, result)) {
      return result;
    }  // else below, which says what is wrong
  }
  check_finite("update_basis", gram_x, gram_y);
  if (gram_x.is_cuda()) {
    return update_batch(right, gram_x, gram_y, steps);
  }
  const auto options = gram_x.options().dtype(at::kFloat);
  Basis result{at::empty(right.sizes(), options), at::empty(right.sizes(), options), {}};
  for_each_share(right.size(0), [&](int64_t begin, int64_t end) {
    const Basis part = update_batch(right.slice(0, begin, end), gram_x.slice(0, begin, end),
                                    gram_y.slice(0, begin, end), steps);
    result.left.slice(0, begin, end).copy_(part.left);
    result.right.slice(0, begin, end).copy_(part.right);
  });
  return result;
}

Basis update_bases(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y,
                   const std::vector<int64_t>& ranks, int64_t steps) {
  at::NoGradGuard no_grad;
  const int64_t n = gram_x.size(0), d = gram_x.size(1);
  TORCH_CHECK(right.dim() == 3 && gram_x.dim() == 3 && gram_y.dim() == 3 && gram_x.size(2) == d &&
                  gram_y.sizes().slice(1) == gram_x.sizes().slice(1) &&
                  right.sizes().slice(1) == gram_x.sizes().slice(1) && right.size(0) > 0 &&
                  n % right.size(0) == 0 && gram_y.size(0) > 0 && n % gram_y.size(0) == 0,
              "update_bases: starts ", right.sizes(), ", Grams ", gram_x.sizes(), " and ",
              gram_y.sizes());
  const auto items_of = items_by_rank(ranks, d - 1);
  TORCH_CHECK(
      static_cast<int64_t>(ranks.size()) == n && !items_of.empty() && items_of.begin()->first >= 1,
      "update_bases: ", ranks.size(), " ranks of ", n, " items of head dim ", d,
      ", expected one each from 1 on, some below ", d);
  const bool in_kernel = !gram_x.is_cuda() && right.scalar_type() == at::kFloat &&
                         kernel_fits(d, items_of);
  const int64_t columns = items_of.rbegin()->first;
  Basis result;
  if (in_kernel && update_items(right, gram_x, gram_y, ranks, columns, steps, result)) {
    return result;
  }
#ifdef DRRL_WITH_CUDA
  if (gram_x.is_cuda() &&
      update_bases_cuda(right, gram_x, gram_y, ranks, columns, steps, kUpdateSettings, result)) {
    return result;
  }
#endif
  const auto room = [&] { return at::empty({n, d, columns}, gram_x.options().dtype(at::kFloat)); };
  result = {room(), room(), {}};
  for (const auto& [rank, items] : items_of) {
    const auto index = on_device(items, gram_x.device());
    const auto shared = [&](const at::Tensor& x) {
      return x.index_select(0, index.div(n / x.size(0), "floor"));
    };
    const Basis updated = update_basis(shared(right.narrow(2, 0, rank)), shared(gram_x),
                                       shared(gram_y), steps);
    result.left.narrow(2, 0, rank).index_copy_(0, index, updated.left);
    result.right.narrow(2, 0, rank).index_copy_(0, index, updated.right);
  }
  return result;
}

Basis solve_basis(const at::Tensor& gram_x, const at::Tensor& gram_y) {
  at::NoGradGuard no_grad;
  check_grams("solve_basis", gram_x, gram_y);
  const int64_t n = gram_x.size(0);
  const int64_t d = gram_x.size(1);
  if (gram_x.is_cuda()) {
    return solve_batch(gram_x, gram_y);
  }
  Basis result{at::empty({n, d, d}, at::kFloat), at::empty({n, d, d}, at::kFloat),
               at::empty({n, d}, at::kDouble)};
  for_each_share(n, [&](int64_t begin, int64_t end) {
    const Basis part = solve_batch(gram_x.slice(0, begin, end), gram_y.slice(0, begin, end));
    result.left.slice(0, begin, end).copy_(part.left);
    result.right.slice(0, begin, end).copy_(part.right);
    result.singular_values.slice(0, begin, end).copy_(part.singular_values);
  });
  return result;
}

at::Tensor tail_loss(const Basis& basis, const at::Tensor& gram_x, const at::Tensor& gram_y) {
  TORCH_CHECK(basis.left.sizes().slice(0, 2) == gram_x.sizes().slice(0, 2) &&
                  gram_x.sizes() == gram_y.sizes(),
              "tail_loss: bases ", basis.left.sizes(), ", Grams ", gram_x.sizes(), " and ",
              gram_y.sizes(), ", expected [N, d, r] and twice [N, d, d]");
  at::NoGradGuard no_grad;
  const auto x = gram_x.to(at::kDouble);
  const auto y = gram_y.to(at::kDouble);
  const auto left = basis.left.to(at::kDouble);
  const auto right = basis.right.to(at::kDouble);
  // tail(r) = tr(G_x G_y) - 2 sum_{i<r} (R^T G_y G_x L)_ii + sum_{i,j<r} (L^T G_x L)_ij (R^T G_y
  // R)_ij
  const auto x_left = at::matmul(x, left);
  const auto y_right = at::matmul(y, right);
  const auto total = (x * y).sum({1, 2}).unsqueeze(1);
  const auto cross = (y_right * x_left).sum(1).cumsum(1);
  const auto both = at::matmul(left.transpose(1, 2), x_left) *
                    at::matmul(right.transpose(1, 2), y_right);
  const auto square = both.cumsum(1).cumsum(2).diagonal(0, 1, 2);
  return at::cat({total, total - 2 * cross + square}, 1).clamp_min(0);
}

at::Tensor stale_loss(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y) {
  at::NoGradGuard no_grad;
  check_grams("stale_loss", gram_x, gram_y);
  TORCH_CHECK(right.sizes() == gram_x.sizes(), "stale_loss: a basis ", right.sizes(), " for Grams ",
              gram_x.sizes());
  auto result = at::empty({right.size(0), right.size(1) + 1}, gram_x.options());
  const auto fill = [&](int64_t begin, int64_t end) {
    const auto x = gram_x.slice(0, begin, end), y = gram_y.slice(0, begin, end);
    auto p = right.slice(0, begin, end).to(at::kDouble);
    p = p / at::linalg_vector_norm(p, 2, {1}, /*keepdim=*/true).clamp_min(1e-300);
    const auto y_p = at::matmul(y, p);
    const auto factor = shifted_cholesky(at::matmul(p.transpose(1, 2), y_p));
    // Columns w_i of Y^T Y p C^-T: Y^T times an orthonormal basis of the range of Y p, one vector
    // after the other.
    const auto w = at::linalg_solve_triangular(factor, y_p.transpose(1, 2),
                                               /*upper=*/false);  // [n, d rows, d]
    const auto kept = (at::matmul(w, x) * w).sum(2).cumsum(1);
    const auto total = (x * y).sum({1, 2}).unsqueeze(1);
    result.slice(0, begin, end).copy_(at::cat({total, total - kept}, 1).clamp_min(0));
  };
  if (gram_x.is_cuda()) {
    fill(0, right.size(0));
  } else {
    for_each_share(right.size(0), fill);
  }
  return result;
}

at::Tensor residual_factor(const Basis& basis, const at::Tensor& gram, const at::Tensor& keys,
                           const std::vector<int64_t>& ranks) {
  TORCH_CHECK(basis.left.dim() == 3 && basis.left.sizes() == basis.right.sizes() &&
                  basis.left.size(0) == gram.size(0) && basis.left.size(1) == gram.size(1) &&
                  keys.sizes() == gram.sizes().slice(0, 1),
              "residual_factor: bases ", basis.left.sizes(), ", Grams ", gram.sizes(), ", keys ",
              keys.sizes());
  at::NoGradGuard no_grad;
  const int64_t columns = basis.left.size(2);
  if (ranks.empty() && gram.size(0) > 0) {
    return residual_factor(basis, gram, keys,
                           std::vector<int64_t>(static_cast<size_t>(gram.size(0)), columns));
  }
  TORCH_CHECK(static_cast<int64_t>(ranks.size()) == gram.size(0) &&
                  std::all_of(ranks.begin(), ranks.end(), [](int64_t rank) { return rank >= 1; }),
              "residual_factor: ", ranks.size(), " ranks of ", gram.size(0),
              " items, expected one each from 1 on");
  const int64_t d = gram.size(1), m = std::min(kResidualColumns, d);
  const auto random = random_signs(d, m, gram.options());
  auto factor = at::empty({gram.size(0), d, m}, gram.options().dtype(at::kFloat));
  const auto items_of = items_by_rank(ranks, columns);
  if (gram.is_cpu() && gram.scalar_type() == at::kDouble &&
      basis.left.scalar_type() == at::kFloat && m % 8 == 0 && kernel_fits(d, items_of)) {
    const auto left = basis.left.contiguous(), right = basis.right.contiguous(),
               g = gram.contiguous(), n = keys.to(at::kDouble).contiguous();
    cpu::for_each_task(gram.size(0), 2 * cpu::residual_scratch_size(d, columns, m),
                       [&](int64_t i, float* scratch) {
                         const int64_t rank = ranks[static_cast<size_t>(i)];
                         if (rank > columns) {
                           return;
                         }
                         cpu::residual_item(
                             d, rank, m, left.const_data_ptr<float>() + i * d * columns,
                             right.const_data_ptr<float>() + i * d * columns, columns,
                             g.const_data_ptr<double>() + i * d * d,
                             1 / (2 * n.const_data_ptr<double>()[i] * static_cast<double>(d)),
                             random.const_data_ptr<double>(), factor.data_ptr<float>() + i * d * m,
                             reinterpret_cast<double*>(scratch));
                       });
    return factor;
  }
#ifdef DRRL_WITH_CUDA
  if (gram.is_cuda() && residual_factor_cuda(basis, gram, keys, ranks, random, factor)) {
    return factor;
  }
#endif
  // The factors [items, d, m] of items of one rank.
  const auto factors = [&](const at::Tensor& items, int64_t rank) {
    const auto share = [&](const at::Tensor& x) {
      return x.index_select(0, items).to(at::kDouble);
    };
    const auto g = share(gram) / (share(keys) * 2.0 * static_cast<double>(d)).view({-1, 1, 1});
    const auto left = share(basis.left.narrow(2, 0, rank)),
               right = share(basis.right.narrow(2, 0, rank));
    const auto times_c = [&](const at::Tensor& x) {  // M G M^T x
      const auto y = at::matmul(g, x - at::matmul(right, at::matmul(left.transpose(1, 2), x)));
      return y - at::matmul(left, at::matmul(right.transpose(1, 2), y));
    };
    auto range = times_c(random.unsqueeze(0).expand({items.size(0), d, m}));
    range = range / at::linalg_vector_norm(range, 2, {1}, /*keepdim=*/true).clamp_min(1e-300);
    const auto c_range = times_c(range);
    auto inner = at::matmul(range.transpose(1, 2), c_range);
    inner.diagonal(0, 1, 2).add_(g.diagonal(0, 1, 2).mean(1, /*keepdim=*/true) * 1e-10 + 1e-300);
    const auto [root, info] = at::linalg_cholesky_ex(inner);  // range^T C range = root root^T
    const auto f = at::linalg_solve_triangular(root, c_range.transpose(1, 2), /*upper=*/false)
                       .transpose(1, 2);  // C range root^-T
    // Where nothing is dropped C is rounding and may have no root: then nothing is to be corrected.
    return at::where(info.view({-1, 1, 1}) == 0, f, at::zeros({}, f.options())).to(at::kFloat);
  };
  for (const auto& [rank, items] : items_of) {
    const auto index = on_device(items, gram.device());
    if (gram.is_cuda()) {
      factor.index_copy_(0, index, factors(index, rank));
      continue;
    }
    for_each_share(index.size(0), [&, rank = rank](int64_t begin, int64_t end) {
      const auto part = index.slice(0, begin, end);
      factor.index_copy_(0, part, factors(part, rank));
    });
  }
  return factor;
}

at::Tensor residual_correction(const at::Tensor& rows, const at::Tensor& factor) {
  const auto flat = rows.flatten(1, -2);  // [N, k, d]
  const auto wide = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto squares = at::bmm(flat, factor.to(rows.scalar_type()))
                           .to(wide)
                           .pow(2)
                           .sum(2)
                           .clamp_max(kLargestCorrection);
  return squares.view(rows.sizes().slice(0, static_cast<size_t>(rows.dim() - 1)));
}

}  // namespace drrl
