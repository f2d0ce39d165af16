#include "core/cpu/basis_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/cpu/attention_kernel.h"

// Small matrices, a few dozen rows: one call each of a general library would cost more than the
// work. Bases lie here as rows, [rank, d], so that every loop runs over neighbours.

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace drrl::cpu {
namespace {

// c [m, n] = a [m, k] b [k, n]; m a multiple of 4, n of 8.
void product(int64_t m, int64_t n, int64_t k, const double* a, const double* b, double* c) {
  for (int64_t i = 0; i < m; i += 4) {
    for (int64_t j = 0; j < n; j += 8) {
      __m256d sum[4][2];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        sum[r][0] = sum[r][1] = _mm256_setzero_pd();
      }
      for (int64_t l = 0; l < k; ++l) {
        const __m256d b0 = _mm256_loadu_pd(b + l * n + j), b1 = _mm256_loadu_pd(b + l * n + j + 4);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const __m256d x = _mm256_broadcast_sd(a + (i + r) * k + l);
          sum[r][0] = _mm256_fmadd_pd(x, b0, sum[r][0]);
          sum[r][1] = _mm256_fmadd_pd(x, b1, sum[r][1]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        _mm256_storeu_pd(c + (i + r) * n + j, sum[r][0]);
        _mm256_storeu_pd(c + (i + r) * n + j + 4, sum[r][1]);
      }
    }
  }
}

// y += x times factor, n a multiple of 4
inline void add_scaled(int64_t n, double factor, const double* x, double* y) {
  const __m256d f = _mm256_set1_pd(factor);
  for (int64_t i = 0; i < n; i += 4) {
    _mm256_storeu_pd(y + i, _mm256_fmadd_pd(f, _mm256_loadu_pd(x + i), _mm256_loadu_pd(y + i)));
  }
}

double dot(int64_t n, const double* x, const double* y) {
  __m256d sum = _mm256_setzero_pd();
  for (int64_t i = 0; i < n; i += 4) {
    sum = _mm256_fmadd_pd(_mm256_loadu_pd(x + i), _mm256_loadu_pd(y + i), sum);
  }
  double parts[4];
  _mm256_storeu_pd(parts, sum);
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

void scale_row(int64_t n, double factor, double* x) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= factor;
  }
}

void transpose(int64_t rows, int64_t columns, const double* x, double* y) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      y[j * rows + i] = x[i * columns + j];
    }
  }
}

// The upper Cholesky factor of a [r, r] in its upper triangle, r a multiple of 4; false if a is not
// positive definite. Entries below are not used.
bool cholesky(int64_t r, double* a) {
  for (int64_t k = 0; k < r; ++k) {
    double* row = a + k * r;
    if (!(row[k] > 0)) {
      return false;
    }
    const double root = std::sqrt(row[k]);
    scale_row(r - k, 1 / root, row + k);
    row[k] = root;
    for (int64_t i = k + 1; i < r; ++i) {
      const int64_t from = i / 4 * 4;
      add_scaled(r - from, -row[i], row + from, a + i * r + from);
    }
  }
  return true;
}

// x [r, d] <- U^-T x for the upper factor U.
void solve_lower(int64_t r, int64_t d, const double* factor, double* x) {
  for (int64_t k = 0; k < r; ++k) {
    scale_row(d, 1 / factor[k * r + k], x + k * d);
    for (int64_t i = k + 1; i < r; ++i) {
      add_scaled(d, -factor[k * r + i], x + k * d, x + i * d);
    }
  }
}

struct Item {
  int64_t d, r;
  const UpdateSettings& settings;
  double *factor, *image, *turned, *scales;  // [r, r], [r, d], [d, r], [r]

  // to [r, d] <- the partner of p [r, d] for this Gram, lifted as little as it needs; false if no
  // lift serves.
  bool partner(const double* p, const double* gram, double* to) const {
    double diagonal = 0;
    for (int64_t i = 0; i < d; ++i) {
      diagonal += gram[i * d + i];
    }
    const double mean = diagonal / static_cast<double>(d);
    for (double lift = settings.first_lift; lift <= settings.largest_lift; lift *= 100) {
      if (lifted_partner(p, gram, diagonal, mean > 0 ? mean * lift : 1,
                         to)) {  // without any rows the identity stands in
        return true;
      }
    }
    return false;
  }

  // The same for gram + floor I; false if that is not definite.
  bool lifted_partner(const double* p, const double* gram, double trace, double floor,
                      double* to) const {
    product(r, d, d, p, gram, image);
    for (int64_t i = 0; i < r; ++i) {
      const double* row = p + i * d;
      double* its = image + i * d;
      add_scaled(d, floor, row, its);
      const double energy = dot(d, row, its);
      if (!(energy > 0) && dot(d, row, row) > 0) {
        return false;
      }
      scales[i] = energy > 0 ? 1 / std::sqrt(energy) : 0;
      scale_row(d, scales[i], its);
    }
    transpose(r, d, image, turned);
    product(r, r, d, p, turned, factor);
    double mean = 0;
    for (int64_t i = 0; i < r; ++i) {
      scale_row(r, scales[i], factor + i * r);
      mean += factor[i * r + i] / static_cast<double>(r);
    }
    mean = std::max(mean, 1e-300);
    for (int64_t i = 0; i < r; ++i) {
      factor[i * r + i] += mean * settings.jitter;
    }
    if (!cholesky(r, factor)) {
      return false;
    }
    std::memcpy(to, image, static_cast<size_t>(r * d) * sizeof(double));
    solve_lower(r, d, factor, to);
    for (int64_t k = r - 1; k >= 0; --k) {
      scale_row(d, 1 / factor[k * r + k], to + k * d);
      for (int64_t i = 0; i < k; ++i) {
        add_scaled(d, -factor[i * r + k], to + k * d, to + i * d);
      }
    }
    double explained = 0;
    for (int64_t i = 0; i < r; ++i) {
      explained += dot(d, to + i * d, image + i * d);
      scale_row(d, scales[i], to + i * d);
    }
    return explained <= kMostExplained * (trace + static_cast<double>(d) * floor);
  }

  void unit(double* p) const {
    for (int64_t i = 0; i < r; ++i) {
      scale_row(d, 1 / std::max(std::sqrt(dot(d, p + i * d, p + i * d)), 1e-300), p + i * d);
    }
  }
};

}  // namespace

bool basis_kernel_fits(int64_t d, int64_t rank) {
  static const bool available = kernel_available();
  return available && d % 8 == 0 && rank % 8 == 0;
}

int64_t update_scratch_size(int64_t d, int64_t rank) {
  return 4 * rank * d + rank * rank + rank;
}

bool update_item(int64_t d, int64_t rank, int64_t steps, const float* start, int64_t start_columns,
                 const double* gram_x, const double* gram_y, const UpdateSettings& settings,
                 float* left, float* right, int64_t columns, double* scratch) {
  const int64_t size = rank * d;
  double *l = scratch, *r = l + size;
  double* factor = r + size;
  double* image = factor + rank * rank;
  const Item item{d, rank, settings, factor, image, image + size, image + 2 * size};
  for (int64_t i = 0; i < rank; ++i) {
    bool empty = true;
    for (int64_t j = 0; j < d; ++j) {
      r[i * d + j] = start[j * start_columns + i];
      empty = empty && r[i * d + j] == 0;
    }
    for (int64_t j = 0; empty && j < d; ++j) {
      r[i * d + j] = random_sign(j * rank + i);
    }
  }
  item.unit(r);
  if (!item.partner(r, gram_y, l)) {
    return false;
  }
  for (int64_t step = 0; step < steps; ++step) {
    item.unit(l);
    if (!item.partner(l, gram_x, r)) {
      return false;
    }
    item.unit(r);
    if (!item.partner(r, gram_y, l)) {
      return false;
    }
  }
  for (int64_t i = 0; i < rank; ++i) {  // columns of equal length on both sides
    const double of_left = std::sqrt(dot(d, l + i * d, l + i * d)),
                 of_right = std::sqrt(dot(d, r + i * d, r + i * d));
    const double balance = std::max(std::sqrt(of_right / std::max(of_left, 1e-300)), 1e-300);
    for (int64_t j = 0; j < d; ++j) {
      left[j * columns + i] = static_cast<float>(l[i * d + j] * balance);
      right[j * columns + i] = static_cast<float>(r[i * d + j] / balance);
    }
  }
  return true;
}

int64_t residual_scratch_size(int64_t d, int64_t rank, int64_t columns) {
  return 4 * rank * d + 3 * columns * d + columns * rank + 2 * columns * columns;
}

void residual_item(int64_t d, int64_t rank, int64_t columns, const float* left, const float* right,
                   int64_t basis_columns, const double* gram, double scale, const double* start,
                   float* to, double* scratch) {
  const int64_t size = rank * d;
  double *l = scratch, *r = l + size, *l_rows = r + size, *r_rows = l_rows + size;
  double *range = r_rows + size, *image = range + columns * d, *other = image + columns * d,
         *inner = other + columns * d, *small = inner + columns * columns;
  for (int64_t j = 0; j < d; ++j) {
    for (int64_t i = 0; i < rank; ++i) {
      l[j * rank + i] = l_rows[i * d + j] = left[j * basis_columns + i];
      r[j * rank + i] = r_rows[i * d + j] = right[j * basis_columns + i];
    }
  }
  // to_rows [columns, d] <- M (scale G) M^T of the rows of x, which is overwritten
  const auto times_c = [&](double* x, double* to_rows) {
    const auto drop = [&](double* rows, const double* down, const double* up, double* room) {
      product(columns, rank, d, rows, down, small);
      product(columns, d, rank, small, up, room);
      for (int64_t i = 0; i < columns * d; ++i) {
        rows[i] -= room[i];
      }
    };
    drop(x, l, r_rows, to_rows);
    product(columns, d, d, x, gram, to_rows);
    scale_row(columns * d, scale, to_rows);
    drop(to_rows, r, l_rows, x);
  };
  transpose(d, columns, start, other);
  times_c(other, range);
  for (int64_t i = 0; i < columns; ++i) {
    scale_row(d, 1 / std::max(std::sqrt(dot(d, range + i * d, range + i * d)), 1e-300),
              range + i * d);
  }
  std::memcpy(other, range, static_cast<size_t>(columns * d) * sizeof(double));
  times_c(other, image);
  transpose(columns, d, image, other);
  product(columns, columns, d, range, other, inner);
  double diagonal = 0;
  for (int64_t i = 0; i < d; ++i) {
    diagonal += gram[i * d + i] * scale / static_cast<double>(d);
  }
  for (int64_t i = 0; i < columns; ++i) {
    inner[i * columns + i] += diagonal * 1e-10 + 1e-300;
  }
  const bool sound = cholesky(columns, inner);
  if (sound) {
    solve_lower(columns, d, inner, image);
  }
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      to[j * columns + i] = sound ? static_cast<float>(image[i * d + j]) : 0;
    }
  }
}

}  // namespace drrl::cpu

#else

namespace drrl::cpu {

bool basis_kernel_fits(int64_t, int64_t) {
  return false;
}
int64_t update_scratch_size(int64_t, int64_t) {
  return 0;
}
bool update_item(int64_t, int64_t, int64_t, const float*, int64_t, const double*, const double*,
                 const UpdateSettings&, float*, float*, int64_t, double*) {
  return false;
}
int64_t residual_scratch_size(int64_t, int64_t, int64_t) {
  return 0;
}
void residual_item(int64_t, int64_t, int64_t, const float*, const float*, int64_t, const double*,
                   double, const double*, float*, double*) {}

}  // namespace drrl::cpu

#endif
