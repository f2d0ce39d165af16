#pragma once

#include "core/cuda/block.h"
#include "core/types/basis_settings.h"

/// update_basis and residual_factor (core/linalg/basis.h) for one item, in double, by one block.
/// Sizes are multiples of 8 where they are ranks or columns and of 4 where they are head dims.
namespace drrl::cuda {

/// Room for a matrix of n columns: rows start at 16 bytes, and threads that each read their own row
/// do not all meet in one bank.
DRRL_HOST_DEVICE int row_stride(int n) {
  return n + 2;
}

template <typename Block>
class SmallMatrices {
 public:
  DRRL_HOST_DEVICE explicit SmallMatrices(const Block& block) : block_(block) {}

  /// c [m, n] = a^T b for a [k, m] and b [k, n], by tiles of T x T a thread.
  template <int T, typename A>
  DRRL_HOST_DEVICE void transposed_product(int m, int n, int k, const A* a, int stride_a,
                                           const double* b, int stride_b, double* c,
                                           int stride_c) const {
    tiles<T>(
        m, n, k, c, stride_c, [=](int l, int i, double (&x)[T]) { load(a + l * stride_a + i, x); },
        [=](int l, int j, double (&y)[T]) { load(b + l * stride_b + j, y); });
  }

  /// c [m, n] = a b for a [m, k] and b [k, n].
  template <int T, typename A>
  DRRL_HOST_DEVICE void product(int m, int n, int k, const A* a, int stride_a, const double* b,
                                int stride_b, double* c, int stride_c) const {
    tiles<T>(
        m, n, k, c, stride_c,
        [=](int l, int i, double (&x)[T]) {
          for (int s = 0; s < T; ++s) {
            x[s] = a[(i + s) * stride_a + l];
          }
        },
        [=](int l, int j, double (&y)[T]) { load(b + l * stride_b + j, y); });
  }

  /// f(i, j) for each entry of an [m, n] matrix.
  template <typename F>
  DRRL_HOST_DEVICE void entries(int m, int n, F f) const {
    block_.each(m * n, [=](int e) { f(e / n, e % n); });
  }

  /// to[j] <- the length of column j of x [m, n].
  DRRL_HOST_DEVICE void lengths(int m, int n, const double* x, int stride, double* to) const {
    block_.sums(
        n, m, [=](int j, int i) { return x[i * stride + j] * x[i * stride + j]; },
        [=](int j, double sum) { to[j] = sqrt(sum); });
  }

  /// Columns of x [m, n] to length one. room [n]
  DRRL_HOST_DEVICE void unit(int m, int n, double* x, int stride, double* room) const {
    lengths(m, n, x, stride, room);
    entries(m, n, [=](int i, int j) { x[i * stride + j] /= fmax(room[j], 1e-300); });
  }

  /// to[0] <- the mean diagonal of a [n, n]
  DRRL_HOST_DEVICE void mean_diagonal(int n, const double* a, int stride, double* to) const {
    block_.sums(
        1, n, [=](int, int j) { return a[j * stride + j]; },
        [=](int, double sum) { *to = sum / n; });
  }

  /// The Cholesky factor of a [r, r]: in place, above the diagonal as U and below it as U^T; of its
  /// diagonal the inverses, [r]. False if a is not positive definite.
  DRRL_HOST_DEVICE bool cholesky(int r, double* a, int stride, double* inverse) const {
    for (int k = 0; k < r; ++k) {
      double* row = a + k * stride + k;
      const double pivot = *row;
      if (!(pivot > 0)) {
        block_.sync();  // before the caller writes what others still read
        return false;
      }
      const double scale = 1 / sqrt(pivot);
      block_.each(r - k, [=](int j) {
        if (j == 0) {
          inverse[k] = scale;
        } else {
          row[j] *= scale;
          row[j * stride] = row[j];
        }
      });
      const int rest = r - k - 1;
      block_.each(rest * rest, [=](int e) {
        const int i = 1 + e / rest, j = 1 + e % rest;
        if (j >= i) {
          row[i * stride + j] -= row[i] * row[j];
        }
      });
    }
    return true;
  }

  /// Each row x of rows [m, r] <- x U^-1 (forward), then x U^-T (backward), for a factor of
  /// `cholesky`. One thread a row, eight columns at a time.
  DRRL_HOST_DEVICE void solve_rows(int m, int r, const double* factor, int stride_f,
                                   const double* inverse, double* rows, int stride, bool forward,
                                   bool backward) const {
    block_.each(m, [=](int i) {
      double* x = rows + i * stride;
      const auto eight = [=](int k, int from, int to, bool ascending) {
        double sum[8];
        load(x + k, sum);
        for (int l = from; l < to; ++l) {
          double f[8];
          load(factor + l * stride_f + k, f);
          const double y = x[l];
          for (int c = 0; c < 8; ++c) {
            sum[c] -= f[c] * y;
          }
        }
        DRRL_UNROLL
        for (int turn = 0; turn < 8; ++turn) {
          const int c = ascending ? turn : 7 - turn;
          const double y = sum[c] * inverse[k + c];
          x[k + c] = y;
          DRRL_UNROLL
          for (int later = turn + 1; later < 8; ++later) {
            const int o = ascending ? later : 7 - later;
            sum[o] -= factor[(k + c) * stride_f + k + o] * y;
          }
        }
      };
      for (int k = 0; forward && k < r; k += 8) {
        eight(k, 0, k, true);
      }
      for (int k = r - 8; backward && k >= 0; k -= 8) {
        eight(k, k + 8, r, false);
      }
    });
  }

 private:
  template <int N>
  DRRL_HOST_DEVICE static void load(const double* from, double (&to)[N]) {
#ifdef __CUDA_ARCH__
    DRRL_UNROLL
    for (int s = 0; s < N; s += 2) {
      const double2 two = *reinterpret_cast<const double2*>(from + s);
      to[s] = two.x;
      to[s + 1] = two.y;
    }
#else
    for (int s = 0; s < N; ++s) {
      to[s] = from[s];
    }
#endif
  }
  template <int N>
  DRRL_HOST_DEVICE static void load(const float* from, double (&to)[N]) {
    for (int s = 0; s < N; ++s) {
      to[s] = from[s];
    }
  }

  template <int T, typename LoadA, typename LoadB>
  DRRL_HOST_DEVICE void tiles(int m, int n, int k, double* c, int stride_c, LoadA load_a,
                              LoadB load_b) const {
    const int across = n / T;
    block_.each(m / T * across, [=](int tile) {
      const int i = tile / across * T, j = tile % across * T;
      double sum[T][T] = {};
      DRRL_UNROLL_4
      for (int l = 0; l < k; ++l) {
        double x[T], y[T];
        load_a(l, i, x);
        load_b(l, j, y);
        for (int s = 0; s < T; ++s) {
          for (int t = 0; t < T; ++t) {
            sum[s][t] += x[s] * y[t];
          }
        }
      }
      for (int s = 0; s < T; ++s) {
        for (int t = 0; t < T; ++t) {
          c[(i + s) * stride_c + j + t] = sum[s][t];
        }
      }
    });
  }

  const Block& block_;
};

/// Doubles of scratch for one item.
DRRL_HOST_DEVICE int update_scratch_size(int d, int rank) {
  return (2 * d + rank) * row_stride(rank) + 2 * rank + 2;
}

template <typename Block>
class UpdateItem {
 public:
  /// start_columns, columns: numbers in a row of the start and of both results.
  DRRL_HOST_DEVICE UpdateItem(const Block& block, int d, int rank, int start_columns, int columns,
                              const UpdateSettings& settings, double* scratch)
      : block_(block),
        d_(d),
        r_(rank),
        start_columns_(start_columns),
        columns_(columns),
        stride_(row_stride(rank)),
        settings_(settings),
        p_(scratch),
        image_(p_ + d * stride_),
        factor_(image_ + d * stride_),
        scales_(factor_ + rank * stride_),
        inverse_(scales_ + rank),
        one_(inverse_ + rank) {}

  /// start [d, rank]; gram_x, gram_y [d, d]; writes left and right, [d, rank]. Empty columns of the
  /// start are filled with random signs. False if a Gram is not definite.
  DRRL_HOST_DEVICE bool run(int steps, const float* start, const double* gram_x,
                            const double* gram_y, float* left, float* right) const {
    const SmallMatrices<Block> m(block_);
    m.entries(d_, r_, [p = p_, start, columns = start_columns_, stride = stride_](int i, int j) {
      p[i * stride + j] = start[i * columns + j];
    });
    m.lengths(d_, r_, p_, stride_, scales_);
    m.entries(d_, r_, [p = p_, scales = scales_, r = r_, stride = stride_](int i, int j) {
      if (scales[j] == 0) {
        p[i * stride + j] = random_sign(static_cast<int64_t>(i) * r + j);
      }
    });
    for (int step = 0; step <= steps; ++step) {
      m.unit(d_, r_, p_, stride_, scales_);
      m.entries(d_, r_, [p = p_, right, columns = columns_, stride = stride_](int i, int j) {
        right[i * columns + j] = static_cast<float>(p[i * stride + j]);
      });
      if (!partner(gram_y)) {
        return false;
      }
      if (step < steps) {
        m.unit(d_, r_, p_, stride_, scales_);
        if (!partner(gram_x)) {
          return false;
        }
      }
    }
    // Columns of equal length on both sides; those of `right` have length one or zero.
    m.lengths(d_, r_, p_, stride_, scales_);
    block_.sums(
        r_, d_,
        [right, columns = columns_](int j, int i) {
          return static_cast<double>(right[i * columns + j]) * right[i * columns + j];
        },
        [inverse = inverse_](int j, double sum) { inverse[j] = sqrt(sum); });
    m.entries(d_, r_, [self = *this, left, right](int i, int j) {
      const double balance = fmax(sqrt(self.inverse_[j] / fmax(self.scales_[j], 1e-300)), 1e-300);
      left[i * self.columns_ + j] = static_cast<float>(self.p_[i * self.stride_ + j] * balance);
      right[i * self.columns_ + j] = static_cast<float>(right[i * self.columns_ + j] / balance);
    });
    return true;
  }

 private:
  /// p [d, r] <- its partner for this Gram, lifted as little as it needs; false if no lift serves.
  DRRL_HOST_DEVICE bool partner(const double* gram) const {
    SmallMatrices<Block>(block_).mean_diagonal(d_, gram, d_, one_);
    const double mean = *one_;
    for (double lift = settings_.first_lift; lift <= settings_.largest_lift; lift *= 100) {
      if (lifted_partner(gram, mean,
                         mean > 0 ? mean * lift : 1)) {  // without any rows the identity stands in
        return true;
      }
    }
    return false;
  }

  /// p [d, r] <- G p (p^T G p)^-1 for G = gram + floor I, the inner matrix scaled to a diagonal of
  /// ones. If G is not definite false, and p stays.
  DRRL_HOST_DEVICE bool lifted_partner(const double* gram, double mean_diagonal,
                                       double floor) const {
    const SmallMatrices<Block> m(block_);
    const int d = d_, r = r_, stride = stride_;
    double *p = p_, *image = image_, *factor = factor_, *scales = scales_, *inverse = inverse_,
           *one = one_;
    m.template transposed_product<4>(d, r, d, gram, d, p, stride, image,
                                     stride);  // the Gram is symmetric
    m.entries(d, r, [=](int i, int j) { image[i * stride + j] += floor * p[i * stride + j]; });
    if (r <= 32) {  // one tile a thread, about
      m.template transposed_product<2>(r, r, d, p, stride, image, stride, factor, stride);
    } else {
      m.template transposed_product<4>(r, r, d, p, stride, image, stride, factor, stride);
    }
    m.lengths(d, r, p, stride, inverse);
    block_.sums(
        1, r, [=](int, int i) { return factor[i * stride + i] > 0 || inverse[i] == 0 ? 0.0 : 1.0; },
        [=](int, double bad) { *one = bad; });
    if (*one > 0) {
      return false;
    }
    block_.each(r, [=](int i) {
      const double energy = factor[i * stride + i];
      scales[i] = energy > 0 ? 1 / sqrt(energy) : 0;
    });
    m.entries(r, r, [=](int i, int j) { factor[i * stride + j] *= scales[i] * scales[j]; });
    m.mean_diagonal(r, factor, stride, one);
    const double jitter = fmax(*one, 1e-300) * settings_.jitter;
    block_.each(r, [=](int i) { factor[i * stride + i] += jitter; });
    if (!m.cholesky(r, factor, stride, inverse)) {
      return false;
    }
    m.entries(d, r, [=](int i, int j) { image[i * stride + j] *= scales[j]; });
    m.solve_rows(d, r, factor, stride, inverse, image, stride, /*forward=*/true,
                 /*backward=*/false);
    block_.sums(
        1, d,
        [=](int, int i) {
          double sum = 0;
          for (int j = 0; j < r; ++j) {
            sum += image[i * stride + j] * image[i * stride + j];
          }
          return sum;
        },
        [=](int, double explained) { *one = explained; });
    if (!(*one <= kMostExplained * d * (mean_diagonal + floor))) {
      return false;
    }
    m.solve_rows(d, r, factor, stride, inverse, image, stride, /*forward=*/false,
                 /*backward=*/true);
    m.entries(d, r, [=](int i, int j) { p[i * stride + j] = image[i * stride + j] * scales[j]; });
    return true;
  }

  const Block& block_;
  int d_, r_, start_columns_, columns_, stride_;
  UpdateSettings settings_;
  double *p_, *image_, *factor_, *scales_, *inverse_, *one_;
};

/// Doubles of scratch for one item.
DRRL_HOST_DEVICE int residual_scratch_size(int d, int rank, int columns) {
  return (3 * d + rank + columns) * row_stride(columns) + columns + 2;
}

/// left, right [d, rank] in rows of basis_columns numbers; gram [d, d] times scale is G_k / (2 n
/// d); start [d, columns] the fixed random columns; writes F [d, columns], zeros where nothing is
/// dropped.
template <typename Block>
DRRL_HOST_DEVICE void residual_item(const Block& block, int d, int rank, int columns,
                                    const float* left, const float* right, int basis_columns,
                                    const double* gram, double scale, const double* start,
                                    float* to, double* scratch) {
  const SmallMatrices<Block> m(block);
  const int stride = row_stride(columns);
  double *range = scratch, *image = range + d * stride, *other = image + d * stride,
         *small = other + d * stride;
  double *inner = small + rank * stride, *inverse = inner + columns * stride,
         *one = inverse + columns;
  // x [d, columns] <- x - up down^T x
  const auto drop = [&](double* x, const float* down, const float* up, double* room) {
    m.template transposed_product<2>(rank, columns, d, down, basis_columns, x, stride, small,
                                     stride);
    m.template product<2>(d, columns, rank, up, basis_columns, small, stride, room, stride);
    m.entries(d, columns, [=](int i, int j) { x[i * stride + j] -= room[i * stride + j]; });
  };
  // y <- M (scale G) M^T x; x is overwritten
  const auto times_c = [&](double* x, double* y) {
    drop(x, left, right, y);
    m.template transposed_product<4>(d, columns, d, gram, d, x, stride, y,
                                     stride);  // the Gram is symmetric
    m.entries(d, columns, [=](int i, int j) { y[i * stride + j] *= scale; });
    drop(y, right, left, x);
  };
  m.entries(d, columns, [=](int i, int j) { other[i * stride + j] = start[i * columns + j]; });
  times_c(other, range);
  m.unit(d, columns, range, stride, inverse);
  m.entries(d, columns, [=](int i, int j) { other[i * stride + j] = range[i * stride + j]; });
  times_c(other, image);
  m.template transposed_product<2>(columns, columns, d, range, stride, image, stride, inner,
                                   stride);
  m.mean_diagonal(d, gram, d, one);
  const double lift = *one * scale * 1e-10 + 1e-300;
  block.each(columns, [=](int i) { inner[i * stride + i] += lift; });
  const bool sound = m.cholesky(columns, inner, stride, inverse);
  if (sound) {
    m.solve_rows(d, columns, inner, stride, inverse, image, stride, /*forward=*/true,
                 /*backward=*/false);
  }
  m.entries(d, columns, [=](int i, int j) {
    to[i * columns + j] = sound ? static_cast<float>(image[i * stride + j]) : 0.0f;
  });
}

}  // namespace drrl::cuda
