#include "core/cpu/attention_kernel.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/types/basis_settings.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace drrl::cpu {
namespace {

constexpr int64_t
    kRows = 6;  // rows of a register tile: 6 x 16 accumulators are 12 of the 16 registers
constexpr int64_t
    kQueryBlock = 96;  // a block of scores, 96 x 256 floats, stays in the second-level cache
constexpr int64_t kKeyBlock = 256;
constexpr float kLeastThatStays = 1e-4F;  // of the weights so far, for what gates leave at low rank
                                          // to be told by subtraction
constexpr float kLargestExponent = 60;    // an exact score may exceed a row's maximum by so much
                                          // before the maximum is raised
constexpr int64_t
    kScoreStride = kKeyBlock +
                   kWidth;  // not a power of two, so that a column does not fall into one cache set

// c[M x 16] = or += sum over i < depth of a(row, i) b[i b_stride + 0..15]; a(row, i) is a[row
// a_stride + i], or a[i a_stride + row] if transposed. Packed: b_stride is kWidth.
template <int M, bool kTransposed, bool kAccumulate, bool kPacked>
inline void tile(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                 float* c, int64_t c_stride) {
  __m256 sum[M][2];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    sum[m][0] = kAccumulate ? _mm256_loadu_ps(c + m * c_stride) : _mm256_setzero_ps();
    sum[m][1] = kAccumulate ? _mm256_loadu_ps(c + m * c_stride + 8) : _mm256_setzero_ps();
  }
  for (int64_t i = 0; i < depth; ++i) {
    const __m256 b0 = _mm256_loadu_ps(b);
    const __m256 b1 = _mm256_loadu_ps(b + 8);
    b += kPacked ? kWidth : b_stride;
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const __m256 x = _mm256_broadcast_ss(kTransposed ? a + m : a + m * a_stride);
      sum[m][0] = _mm256_fmadd_ps(x, b0, sum[m][0]);
      sum[m][1] = _mm256_fmadd_ps(x, b1, sum[m][1]);
    }
    a += kTransposed ? a_stride : 1;
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    _mm256_storeu_ps(c + m * c_stride, sum[m][0]);
    _mm256_storeu_ps(c + m * c_stride + 8, sum[m][1]);
  }
}

// c[rows x 16] likewise, of any number of rows.
template <bool kTransposed, bool kAccumulate, bool kPacked>
inline void panel(int64_t rows, int64_t depth, const float* a, int64_t a_stride, const float* b,
                  int64_t b_stride, float* c, int64_t c_stride) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) {
    tile<kRows, kTransposed, kAccumulate, kPacked>(depth, kTransposed ? a + m : a + m * a_stride,
                                                   a_stride, b, b_stride, c + m * c_stride,
                                                   c_stride);
  }
  const float* rest = kTransposed ? a + m : a + m * a_stride;
  float* to = c + m * c_stride;
  switch (rows - m) {
    case 1:
      tile<1, kTransposed, kAccumulate, kPacked>(depth, rest, a_stride, b, b_stride, to, c_stride);
      break;
    case 2:
      tile<2, kTransposed, kAccumulate, kPacked>(depth, rest, a_stride, b, b_stride, to, c_stride);
      break;
    case 3:
      tile<3, kTransposed, kAccumulate, kPacked>(depth, rest, a_stride, b, b_stride, to, c_stride);
      break;
    case 4:
      tile<4, kTransposed, kAccumulate, kPacked>(depth, rest, a_stride, b, b_stride, to, c_stride);
      break;
    case 5:
      tile<5, kTransposed, kAccumulate, kPacked>(depth, rest, a_stride, b, b_stride, to, c_stride);
      break;
    default: break;
  }
}

// c[rows x columns] = or += a b with b packed in panels of 16 columns: [columns / 16][depth][16].
// `panel_depth` is the depth that b was packed with, at least `depth`.
template <bool kTransposed, bool kAccumulate>
void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride,
             const float* b, int64_t panel_depth, float* c, int64_t c_stride) {
  for (int64_t n = 0; n < columns; n += kWidth, b += panel_depth * kWidth) {
    panel<kTransposed, kAccumulate, true>(rows, depth, a, a_stride, b, kWidth, c + n, c_stride);
  }
}

// x[rows x columns] -> panels of 16 columns, [columns / 16][rows][16].
void pack_columns(const float* x, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t n = 0; n < columns; n += kWidth) {
    for (int64_t i = 0; i < rows; ++i, to += kWidth) {
      _mm256_storeu_ps(to, _mm256_loadu_ps(x + i * stride + n));
      _mm256_storeu_ps(to + 8, _mm256_loadu_ps(x + i * stride + n + 8));
    }
  }
}

inline void transpose8(const float* from, int64_t stride, float* to, int64_t to_stride) {
  __m256 r[8];
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm256_loadu_ps(from + i * stride);
  }
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  __m256 u[8];
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(u[i], u[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(u[i], u[i + 4], 0x31));
  }
}

// x[rows x columns] -> its transpose in panels of 16 rows of x, [padded rows / 16][columns][16],
// missing rows zero.
void pack_rows(const float* x, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t m = 0; m < rows; m += kWidth, to += columns * kWidth) {
    if (m + kWidth <= rows) {
      for (int64_t n = 0; n < columns; n += 8) {
        transpose8(x + m * stride + n, stride, to + n * kWidth, kWidth);
        transpose8(x + (m + 8) * stride + n, stride, to + n * kWidth + 8, kWidth);
      }
    } else {
      for (int64_t n = 0; n < columns; ++n) {
        for (int64_t i = 0; i < kWidth; ++i) {
          to[n * kWidth + i] = m + i < rows ? x[(m + i) * stride + n] : 0.0f;
        }
      }
    }
  }
}

// Cephes' expf, relative error below 2e-7, for x <= 0 (or a little above); 0 below -87.3, -inf
// included.
inline __m256 exponential(__m256 x) {
  const __m256 low = _mm256_set1_ps(-87.33654f);
  const __m256 alive = _mm256_cmp_ps(x, low, _CMP_GE_OQ);
  x = _mm256_max_ps(x, low);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fmadd_ps(n, _mm256_set1_ps(2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  const __m256 e = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(_mm256_mul_ps(e, _mm256_castsi256_ps(power)), alive);
}

inline float largest(__m256 x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}

inline float sum_of(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}

// What weights of a row are made by: exp(x by - less) for each score x.
struct Exponent {
  __m256 by, less;
};

// Of scores times `scale` less `shift`. Where those have no digits behind the point, a fused
// product leaves the largest any distance from zero: there the row [count] becomes the difference
// itself, at most `most`.
Exponent exponent_of(float* row, int64_t count, float scale, float shift, float most) {
  constexpr float kNoDigits = 1e6F;
  if (std::abs(shift) < kNoDigits) {
    return {_mm256_set1_ps(scale), _mm256_set1_ps(shift)};
  }
  for (int64_t j = 0; j < count; ++j) {
    const volatile float product = row[j] * scale;  // rounded
    row[j] = std::min(product - shift, most);
  }
  return {_mm256_set1_ps(1), _mm256_setzero_ps()};
}

// Keys [begin, ...) of a block that query `i` sees.
inline int64_t visible(const Shape& shape, int64_t i, int64_t begin, int64_t count) {
  return shape.causal ? std::clamp<int64_t>(shape.offset + i + 1 - begin, 0, count) : count;
}

// First query block that key block `block` is visible to.
int64_t first_query_block(const Shape& shape, int64_t block) {
  return shape.causal ? std::max<int64_t>(0, block * kKeyBlock - shape.offset) / kQueryBlock : 0;
}

}  // namespace

bool kernel_available() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

int64_t Shape::query_blocks() const {
  return (queries + kQueryBlock - 1) / kQueryBlock;
}
int64_t Shape::key_blocks() const {
  return (keys + kKeyBlock - 1) / kKeyBlock;
}

int64_t packed_size(const Shape& shape) {
  return shape.padded_keys() * (shape.qk + shape.v);
}

int64_t key_chunk_rows() {
  return kKeyBlock;
}
int64_t query_block_rows() {
  return kQueryBlock;
}

// k and v point to the chunk's first row, packed to the beginning of all chunks.
void pack_chunk(const Shape& shape, const float* k, int64_t k_stride, const float* v,
                int64_t v_stride, int64_t chunk, float* packed) {
  const int64_t begin = chunk * kKeyBlock;
  const int64_t count = std::min(kKeyBlock, shape.keys - begin);
  const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;
  packed += begin * (shape.qk + shape.v);
  pack_rows(k, k_stride, count, shape.qk, packed);
  pack_columns(v, v_stride, count, shape.v, packed + padded * shape.qk);
}

void pack(const Shape& shape, Matrix<const float> k, Matrix<const float> v, float* packed) {
  for (int64_t chunk = 0; chunk < shape.key_blocks(); ++chunk) {
    pack_chunk(shape, k.at(0, chunk * kKeyBlock), k.row, v.at(0, chunk * kKeyBlock), v.row, chunk,
               packed);
  }
}

void pack_matrix(const float* p, int64_t stride, int64_t rows, int64_t columns, float* panels) {
  pack_columns(p, stride, rows, columns, panels);
}
void pack_transposed(const float* p, int64_t stride, int64_t rows, int64_t columns, float* panels) {
  pack_rows(p, stride, rows, columns, panels);
}

void multiply(int64_t rows, int64_t columns, int64_t depth, const float* x, int64_t x_stride,
              const float* panels, float* to, int64_t to_stride, bool add) {
  if (add) {
    product<false, true>(rows, columns, depth, x, x_stride, panels, depth, to, to_stride);
  } else {
    product<false, false>(rows, columns, depth, x, x_stride, panels, depth, to, to_stride);
  }
}

namespace {

constexpr int64_t kAtOnce = 4;  // gathered rows

template <typename Some>
void gather(int64_t count, Some&& some) {
  int64_t e = 0;
  for (; e + kAtOnce <= count; e += kAtOnce) {
    some(std::integral_constant<int, kAtOnce>(), e);
  }
  for (; e < count; ++e) {
    some(std::integral_constant<int, 1>(), e);
  }
}

}  // namespace

void gathered_dots(int64_t d, const float* x, const float* rows, const int32_t* index,
                   int64_t count, float* dots) {
  gather(count, [&]<int n>(std::integral_constant<int, n>, int64_t first) {
    __m256 sums[n];
    const float* row[n];
    for (int i = 0; i < n; ++i) {
      sums[i] = _mm256_setzero_ps();
      row[i] = rows + index[first + i] * d;
    }
    for (int64_t j = 0; j < d; j += 8) {
      const __m256 y = _mm256_loadu_ps(x + j);
      for (int i = 0; i < n; ++i) {
        sums[i] = _mm256_fmadd_ps(y, _mm256_loadu_ps(row[i] + j), sums[i]);
      }
    }
    if constexpr (n == kAtOnce) {
      const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]),
                                        _mm256_hadd_ps(sums[2], sums[3]));
      _mm_storeu_ps(dots + first,
                    _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    } else {
      dots[first] = sum_of(sums[0]);
    }
  });
}

void add_gathered(int64_t d, const float* weights, const float* rows, const int32_t* index,
                  int64_t count, float* to) {
  gather(count, [&]<int n>(std::integral_constant<int, n>, int64_t first) {
    __m256 factor[n];
    const float* row[n];
    for (int i = 0; i < n; ++i) {
      factor[i] = _mm256_set1_ps(weights[first + i]);
      row[i] = rows + index[first + i] * d;
    }
    for (int64_t j = 0; j < d; j += 8) {
      __m256 y = _mm256_loadu_ps(to + j);
      for (int i = 0; i < n; ++i) {
        y = _mm256_fmadd_ps(factor[i], _mm256_loadu_ps(row[i] + j), y);
      }
      _mm256_storeu_ps(to + j, y);
    }
  });
}

void add_rows(int64_t rows, int64_t columns, const float* x, int64_t x_stride, float* to,
              int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += 8) {
      float* y = to + i * to_stride + j;
      _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), _mm256_loadu_ps(x + i * x_stride + j)));
    }
  }
}

void add_gram(int64_t rows, int64_t d, const float* x, int64_t x_stride, const float* weights,
              float* gram, float* scratch) {
  for (int64_t first = 0; first < rows;
       first += kKeyBlock) {  // what is read again for every panel stays in the first-level cache
    const int64_t count = std::min(kKeyBlock, rows - first);
    const float* chunk = x + first * x_stride;
    for (int64_t i = 0; weights != nullptr && i < count; ++i) {
      const __m256 w = _mm256_set1_ps(weights[first + i]);
      for (int64_t j = 0; j < d; j += 8) {
        _mm256_storeu_ps(scratch + i * d + j,
                         _mm256_mul_ps(_mm256_loadu_ps(chunk + i * x_stride + j), w));
      }
    }
    for (int64_t n = 0; n < d; n += kWidth) {
      const float* right = weights != nullptr ? scratch + n : chunk + n;
      panel<true, true, false>(n + kWidth, count, chunk, x_stride, right,
                               weights != nullptr ? d : x_stride, gram + n, d);
    }
  }
}

void corrections(int64_t rows, int64_t d, int64_t columns, const float* q, int64_t q_stride,
                 const float* panels, float* correction, float* scratch) {
  product<false, false>(rows, columns, d, q, q_stride, panels, d, scratch, columns);
  for (int64_t i = 0; i < rows; ++i) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j < columns; j += 8) {
      const __m256 x = _mm256_loadu_ps(scratch + i * columns + j);
      sum = _mm256_fmadd_ps(x, x, sum);
    }
    correction[i] = std::min(sum_of(sum), kLargestCorrection);
  }
}

namespace {

// The softmax of some rows over the keys seen so far: out = sum / total, log-sum-exp = maximum +
// log(total).
struct Running {
  float* maximum;  // [rows]
  float* total;    // [rows]
  float* sum;      // [rows][width]
  int64_t width;

  void clear(int64_t rows) const {
    std::fill(maximum, maximum + rows, -std::numeric_limits<float>::infinity());
    std::fill(total, total + rows, 0.0f);
    std::fill(sum, sum + rows * width, 0.0f);
  }
};

void rescale_row(float* row, int64_t width, float by) {
  const __m256 factor = _mm256_set1_ps(by);
  for (int64_t j = 0; j < width; j += 8) {
    _mm256_storeu_ps(row + j, _mm256_mul_ps(_mm256_loadu_ps(row + j), factor));
  }
}

// Queries at full width, for a part's exact entries, which are listed.
struct FullRows {
  const float* q = nullptr;
  int64_t stride = 0, d = 0;
  ExactList* exact = nullptr;
};

// Where the set bits of a mask are, from the lowest on: a byte each.
constexpr auto kSetBits = [] {
  std::array<uint64_t, 256> table{};
  for (unsigned mask = 0; mask < 256; ++mask) {
    int shift = 0;
    for (uint64_t bit = 0; bit < 8; ++bit) {
      if ((mask >> bit & 1U) != 0) {
        table[mask] |= bit << shift;
        shift += 8;
      }
    }
  }
  return table;
}();

// The columns of all x >= least, ascending; up to 8 more may be written. Returns how many there
// are.
int64_t columns_from(float least, const float* x, int64_t count, int32_t* columns) {
  const __m256 bound = _mm256_set1_ps(least);
  int64_t found = 0;
  for (int64_t j = 0; j < count; j += 8) {
    const auto mask = static_cast<unsigned>(
        _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + j), bound, _CMP_GE_OQ)));
    const __m256i set = _mm256_cvtepu8_epi32(
        _mm_cvtsi64_si128(static_cast<int64_t>(kSetBits[mask])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + found),
                        _mm256_add_epi32(set, _mm256_set1_epi32(static_cast<int32_t>(j))));
    found += __builtin_popcount(mask);
  }
  return found;
}

// Adds a part's keys to the running softmax `to` of `rows` queries of the part's width; to.width is
// that of its values. `other` [rows][other_width] are sums of the same rows that a new maximum
// rescales too, null if there are none.
class KeysAdder {
 public:
  KeysAdder(int64_t rows, float scale, const float* queries, int64_t queries_stride,
            const Part& part, const float* correction, const Running& to, float* other,
            int64_t other_width, float* scores, const FullRows& full)
      : rows_(rows),
        scale_(scale),
        queries_(queries),
        queries_stride_(queries_stride),
        part_(part),
        correction_(correction),
        to_(to),
        other_(other),
        other_width_(other_width),
        scores_(scores),
        full_(full) {}

  void run() {
    const int64_t end = std::min(part_.keys, part_.visible + rows_ - 1);
    const float* packed = part_.packed;
    for (begin_ = 0; begin_ < end; begin_ += kKeyBlock) {
      count_ = std::min(kKeyBlock, part_.keys - begin_);
      const int64_t padded = (count_ + kWidth - 1) / kWidth * kWidth;
      keys_ = packed;
      const float* values = packed + padded * part_.qk;
      packed += padded * (part_.qk + part_.v);
      const int64_t seen = std::min(count_, end - begin_);  // by any row
      used_ = (seen + kWidth - 1) / kWidth * kWidth;
      product<false, false>(rows_, used_, part_.qk, queries_, queries_stride_, keys_, part_.qk,
                            scores_, kScoreStride);
      for (int64_t i = 0; i < rows_; ++i) {
        weigh(i);
      }
      product<false, true>(rows_, part_.v, seen, scores_, kScoreStride, values, count_, to_.sum,
                           part_.v);
    }
  }

 private:
  float* row_of(int64_t i) const { return scores_ + i * kScoreStride; }
  int64_t visible_to(int64_t i) const {
    return std::clamp<int64_t>(part_.visible + i - begin_, 0, count_);
  }

  // The row's scores <- -infinity where it sees no key.
  void mask(int64_t i) const {
    if (const int64_t n = visible_to(i); n < used_) {
      std::fill(row_of(i) + n, row_of(i) + used_, -std::numeric_limits<float>::infinity());
    }
  }

  // The row's scores <- exp(score - shift), where shift is `maximum` less the row's correction.
  // Returns their sum.
  float to_weights(int64_t i, float maximum) const {
    float* row = row_of(i);
    const Exponent exponent = exponent_of(row, used_, scale_, maximum - correction_[i], 0);
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j < used_; j += 8) {
      const __m256 e = exponential(
          _mm256_fmsub_ps(_mm256_loadu_ps(row + j), exponent.by, exponent.less));
      _mm256_storeu_ps(row + j, e);
      sum = _mm256_add_ps(sum, e);
    }
    return sum_of(sum);
  }

  // Raises the row's maximum, to which all that was summed is relative. Returns the factor.
  float raise(int64_t i, float maximum) const {
    const float rescale = std::exp(to_.maximum[i] - maximum);
    to_.total[i] *= rescale;
    to_.maximum[i] = maximum;
    rescale_row(to_.sum + i * to_.width, to_.width, rescale);
    if (other_ != nullptr) {
      rescale_row(other_ + i * other_width_, other_width_, rescale);
    }
    return rescale;
  }

  // The row's scores in this chunk <- their weights; adds them up, exact entries apart.
  void weigh(int64_t i) {
    float* row = row_of(i);
    mask(i);
    __m256 top = _mm256_loadu_ps(row);
    for (int64_t j = 8; j < used_; j += 8) {
      top = _mm256_max_ps(top, _mm256_loadu_ps(row + j));
    }
    const float largest_here = largest(top) * scale_ + correction_[i];
    const float new_maximum = std::max(to_.maximum[i], largest_here);
    if (new_maximum == -std::numeric_limits<float>::infinity()) {  // nothing visible yet
      std::fill(row, row + used_, 0.0f);
      return;
    }
    const float weights = to_weights(i, new_maximum);
    const float before = to_.total[i] * std::exp(to_.maximum[i] - new_maximum),
                with_chunk = before + weights;
    const float least = std::max(part_.gate * with_chunk, std::numeric_limits<float>::min());
    // In most chunks no weight is large enough; the factor is more than the two exponentials
    // differ by.
    const bool none = part_.exact_k == nullptr ||
                      std::exp(largest_here - new_maximum) * 1.00001F < least;
    const int64_t found = none ? 0 : columns_from(least, row, used_, heavy_.data());
    const float largest_exact = found > 0 ? exact_scores(i, found) : 0;
    if (found > 0 && !enough_stays(row, found, with_chunk, largest_exact - new_maximum)) {
      weigh_without_heavy(i, found, largest_exact);
    } else {
      if (new_maximum != to_.maximum[i]) {
        raise(i, new_maximum);
      }
      to_.total[i] = with_chunk;
    }
    if (found > 0) {
      add_exact(i, found, largest_exact);
    }
  }

  // exact_ <- exact products of the row with its `found` heavy keys; what fills up the last few has
  // no weight. Returns the largest score.
  float exact_scores(int64_t i, int64_t found) {
    std::fill(heavy_.begin() + found, heavy_.begin() + rounded(found), heavy_[0]);
    gathered_dots(full_.d, full_.q + i * full_.stride, part_.exact_k + begin_ * full_.d,
                  heavy_.data(), rounded(found), exact_.data());
    return *std::max_element(exact_.begin(), exact_.begin() + found) * scale_;
  }
  static int64_t rounded(int64_t found) { return (found + kAtOnce - 1) / kAtOnce * kAtOnce; }

  // Whether what is left of the weights without the heavy ones can be told by subtraction.
  bool enough_stays(const float* row, int64_t found, float with_chunk, float exact_exponent) const {
    float stays = with_chunk;
    for (int64_t e = 0; e < found; ++e) {
      stays -= row[heavy_[static_cast<std::size_t>(e)]];
    }
    return stays + std::exp(std::min(exact_exponent, 0.0F)) >= kLeastThatStays * with_chunk;
  }

  // Nearly all weight is of entries whose exact scores are far smaller: relative to their low ones,
  // what stays has no digits left. Weighs the row once more without them.
  void weigh_without_heavy(int64_t i, int64_t found, float largest_exact) {
    float* row = row_of(i);
    product<false, false>(1, used_, part_.qk, queries_ + i * queries_stride_, queries_stride_,
                          keys_, part_.qk, row, kScoreStride);
    mask(i);
    for (int64_t e = 0; e < found; ++e) {
      row[heavy_[static_cast<std::size_t>(e)]] = -std::numeric_limits<float>::infinity();
    }
    const float others = *std::max_element(row, row + used_) * scale_ + correction_[i];
    if (const float maximum = std::max(others, largest_exact); maximum > to_.maximum[i]) {
      raise(i, maximum);
    }
    to_.total[i] += to_weights(i, to_.maximum[i]);
  }

  // Replaces the heavy entries' weights by exact ones, adds their exact values, and lists them.
  void add_exact(int64_t i, int64_t found, float largest_exact) {
    float* row = row_of(i);
    if (largest_exact > to_.maximum[i] + kLargestExponent) {
      rescale_row(row, used_, raise(i, largest_exact));
    }
    const Exponent exponent = exponent_of(exact_.data(), rounded(found), scale_, to_.maximum[i],
                                          kLargestExponent);
    for (int64_t e = 0; e < found; e += 8) {
      _mm256_storeu_ps(exact_.data() + e,
                       exponential(_mm256_fmsub_ps(_mm256_loadu_ps(exact_.data() + e), exponent.by,
                                                   exponent.less)));
    }
    std::fill(exact_.begin() + found, exact_.begin() + rounded(found), 0.0f);
    std::vector<ExactList::Entry>& entries = full_.exact->entries;
    entries.resize(entries.size() + static_cast<std::size_t>(found));
    ExactList::Entry* entry = &entries.back() + 1 - found;
    float change = 0;
    for (int64_t e = 0; e < found; ++e) {
      const int32_t column = heavy_[static_cast<std::size_t>(e)];
      change += exact_[static_cast<std::size_t>(e)] - row[column];
      row[column] = 0;
      *entry++ = {static_cast<int32_t>(i), part_.first_key + static_cast<int32_t>(begin_) + column};
    }
    to_.total[i] += change;
    add_gathered(full_.d, exact_.data(), part_.exact_v + begin_ * full_.d, heavy_.data(),
                 rounded(found),
                 other_ != nullptr ? other_ + i * other_width_ : to_.sum + i * to_.width);
  }

  int64_t rows_;
  float scale_;
  const float* queries_;
  int64_t queries_stride_;
  const Part& part_;
  const float* correction_;
  Running to_;
  float* other_;
  int64_t other_width_;
  float* scores_;
  const FullRows& full_;
  std::array<int32_t, kKeyBlock + 8> heavy_;  // columns of the weights that a gate makes exact
  std::array<float, kKeyBlock + 8> exact_;    // their scores, then weights
  // The chunk under way: keys [begin, begin + count), of which a row sees at most `used`, rounded
  // up.
  int64_t begin_ = 0, count_ = 0, used_ = 0;
  const float* keys_ = nullptr;
};

float log_sum(const Running& r, int64_t i) {
  return r.maximum[i] + std::log(r.total[i]);
}

}  // namespace

// scores; the softmax so far; the sums of one part; projected queries; corrections
int64_t forward_rows_scratch_size(int64_t d) {
  return kQueryBlock * (kScoreStride + 3 * d + 3);
}
int64_t forward_scratch_size(const Shape& shape) {
  return forward_rows_scratch_size(std::max(shape.qk, shape.v));
}

void forward_rows(int64_t rows, int64_t d, float scale, const float* q, int64_t q_stride,
                  const Part* parts, int64_t count_parts, float* out, int64_t out_stride,
                  float* logsumexp, int64_t logsumexp_stride, ExactList* exact, float* scratch) {
  const auto take = [&](int64_t floats) {
    return std::exchange(scratch, scratch + kQueryBlock * floats);
  };
  float* scores = take(kScoreStride);
  float* sum = take(d);
  float* part_sum = take(d);  // [rows][v] of a part with values of its own width
  float* queries = take(d);
  float* correction = take(1);
  float* maximum = take(1);
  float* total = take(1);
  const Running all{maximum, total, sum, d};
  all.clear(rows);
  const FullRows full{q, q_stride, d, exact};
  for (const Part* part = parts; part != parts + count_parts; ++part) {
    if (part->exact_k != nullptr) {
      exact->parts.push_back(exact->entries.size());
    }
    std::fill(correction, correction + rows, 0.0f);
    if (part->correct != nullptr) {
      corrections(rows, d, part->correct_columns, q, q_stride, part->correct, correction, queries);
    }
    const bool projects = part->project != nullptr;
    if (projects) {
      product<false, false>(rows, part->qk, d, q, q_stride, part->project, d, queries, part->qk);
    }
    const float* of_width = projects ? queries : q;
    const int64_t stride = projects ? part->qk : q_stride;
    if (part->expand != nullptr) {
      std::fill(part_sum, part_sum + rows * part->v, 0.0f);
      KeysAdder(rows, scale, of_width, stride, *part, correction,
                {maximum, total, part_sum, part->v}, sum, d, scores, full)
          .run();
      product<false, true>(rows, d, part->v, part_sum, part->v, part->expand, part->v, sum, d);
    } else {
      KeysAdder(rows, scale, of_width, stride, *part, correction, all, nullptr, 0, scores, full)
          .run();
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    const __m256 inverse = _mm256_set1_ps(1.0f / total[i]);
    for (int64_t j = 0; j < d; j += 8) {
      _mm256_storeu_ps(out + i * out_stride + j,
                       _mm256_mul_ps(_mm256_loadu_ps(sum + i * d + j), inverse));
    }
    logsumexp[i * logsumexp_stride] = log_sum(all, i);
  }
}

void forward_block(const Shape& shape, Matrix<const float> q, const float* packed,
                   Matrix<float> out, Matrix<float> logsumexp, int64_t head, int64_t block,
                   float* scratch) {
  const int64_t first = block * kQueryBlock;
  const int64_t rows = std::min(kQueryBlock, shape.queries - first);
  const Part part{packed, shape.keys, shape.qk, shape.v,
                  shape.causal ? shape.offset + first + 1 : Part::kAll};
  // Without a basis the width of the sums is that of the values, whatever that of the queries.
  forward_rows(rows, shape.v, shape.scale, q.at(head, first), q.row, &part, 1, out.at(head, first),
               out.row, logsumexp.at(head, first), logsumexp.row, nullptr, scratch);
}

int64_t packed_queries_size(const Shape& shape) {
  return shape.heads * shape.queries * (shape.qk + shape.v);
}

void pack_queries(const Shape& shape, const BackwardOperands& x, int64_t head, float* packed) {
  packed += head * shape.queries * (shape.qk + shape.v);
  for (int64_t first = 0; first < shape.queries; first += kQueryBlock) {
    const int64_t rows = std::min(kQueryBlock, shape.queries - first);
    pack_columns(x.q.at(head, first), x.q.row, rows, shape.qk, packed);
    packed += rows * shape.qk;
    pack_columns(x.grad_out.at(head, first), x.grad_out.row, rows, shape.v, packed);
    packed += rows * shape.v;
  }
}

int64_t backward_scratch_size(const Shape& shape) {
  return kKeyBlock * (3 * shape.qk + 2 * shape.v) + 2 * kQueryBlock * kScoreStride;
}

void backward_block(const Shape& shape, const BackwardOperands& x, const float* packed_queries,
                    int64_t block, const Order& order, float* scratch) {
  const int64_t begin = block * kKeyBlock;
  const int64_t count = std::min(kKeyBlock, shape.keys - begin);
  float* keys_by_row = scratch;                                 // K^T in panels of keys
  float* values_by_row = keys_by_row + kKeyBlock * shape.qk;    // V^T likewise
  float* keys_by_column = values_by_row + kKeyBlock * shape.v;  // K in panels of columns
  float* grad_k = keys_by_column + kKeyBlock * shape.qk;        // [count][qk]
  float* grad_v = grad_k + kKeyBlock * shape.qk;                // [count][v]
  float* weights = grad_v + kKeyBlock * shape.v;                // scores, then softmax weights
  float* grads = weights + kQueryBlock * kScoreStride;  // of the weights, then of the scores
  pack_rows(x.k.at(0, begin), x.k.row, count, shape.qk, keys_by_row);
  pack_rows(x.v.at(0, begin), x.v.row, count, shape.v, values_by_row);
  pack_columns(x.k.at(0, begin), x.k.row, count, shape.qk, keys_by_column);
  std::fill(grad_k, grad_k + count * shape.qk, 0.0f);
  std::fill(grad_v, grad_v + count * shape.v, 0.0f);
  const __m256 scale = _mm256_set1_ps(shape.scale);

  for (int64_t head = 0; head < shape.heads; ++head) {
    for (int64_t qb = first_query_block(shape, block); qb < shape.query_blocks(); ++qb) {
      const int64_t first = qb * kQueryBlock;
      const int64_t rows = std::min(kQueryBlock, shape.queries - first);
      const int64_t seen = shape.causal ? std::min(count, shape.offset + first + rows - begin)
                                        : count;
      const int64_t used = (seen + kWidth - 1) / kWidth * kWidth;
      const float* q_packed = packed_queries +
                              (head * shape.queries + first) * (shape.qk + shape.v);
      const float* grad_packed = q_packed + rows * shape.qk;
      product<false, false>(rows, used, shape.qk, x.q.at(head, first), x.q.row, keys_by_row,
                            shape.qk, weights, kScoreStride);
      product<false, false>(rows, used, shape.v, x.grad_out.at(head, first), x.grad_out.row,
                            values_by_row, shape.v, grads, kScoreStride);
      for (int64_t i = 0; i < rows; ++i) {
        float* w = weights + i * kScoreStride;
        float* g = grads + i * kScoreStride;
        const int64_t n = visible(shape, first + i, begin, count);
        std::fill(w + n, w + used, -std::numeric_limits<float>::infinity());
        const Exponent exponent = exponent_of(w, used, shape.scale,
                                              *x.logsumexp.at(head, first + i), 0);
        const __m256 delta = _mm256_set1_ps(*x.delta.at(head, first + i));
        for (int64_t j = 0; j < used; j += 8) {
          const __m256 p = exponential(
              _mm256_fmsub_ps(_mm256_loadu_ps(w + j), exponent.by, exponent.less));
          _mm256_storeu_ps(w + j, p);
          const __m256 d = _mm256_mul_ps(_mm256_mul_ps(p, scale),
                                         _mm256_sub_ps(_mm256_loadu_ps(g + j), delta));
          _mm256_storeu_ps(g + j, d);
        }
        if (x.skip.begin != nullptr) {
          const int64_t* list = x.skip.begin + head * x.skip.head + first + i;
          const auto from = static_cast<int32_t>(x.skip.first_key + begin);
          const int32_t* last = x.skip.keys + list[1];
          for (const int32_t* key = std::lower_bound(x.skip.keys + list[0], last, from);
               key != last && *key < from + used; ++key) {
            w[*key - from] = 0;
            g[*key - from] = 0;
          }
        }
      }
      product<true, true>(seen, shape.v, rows, weights, kScoreStride, grad_packed, rows, grad_v,
                          shape.v);
      product<true, true>(seen, shape.qk, rows, grads, kScoreStride, q_packed, rows, grad_k,
                          shape.qk);
      order.turn(order.context, order.key_block, head, qb);
      product<false, true>(rows, shape.qk, seen, grads, kScoreStride, keys_by_column, count,
                           x.grad_q.at(head, first), x.grad_q.row);
      order.done(order.context, order.key_block, head, qb);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    std::memcpy(x.grad_k.at(0, begin + j), grad_k + j * shape.qk,
                static_cast<size_t>(shape.qk) * sizeof(float));
    std::memcpy(x.grad_v.at(0, begin + j), grad_v + j * shape.v,
                static_cast<size_t>(shape.v) * sizeof(float));
  }
}

void exact_row_backward(int64_t d, float scale, const float* q, const float* grad_out,
                        float logsumexp, float delta, const int32_t* keys, int64_t count,
                        const float* k, const float* v, float* grad_q, float* weights,
                        float* scores) {
  gathered_dots(d, q, k, keys, count, weights);
  gathered_dots(d, grad_out, v, keys, count, scores);
  const Exponent exponent = exponent_of(weights, count, scale, logsumexp, 0);
  const __m256 scale8 = _mm256_set1_ps(scale), delta8 = _mm256_set1_ps(delta);
  for (int64_t e = 0; e < count; e += 8) {
    const __m256i some = _mm256_cmpgt_epi32(
        _mm256_set1_epi32(static_cast<int32_t>(std::min<int64_t>(count - e, 8))),
        _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256 p = exponential(
        _mm256_fmsub_ps(_mm256_maskload_ps(weights + e, some), exponent.by, exponent.less));
    const __m256 g = _mm256_mul_ps(_mm256_mul_ps(p, scale8),
                                   _mm256_sub_ps(_mm256_maskload_ps(scores + e, some), delta8));
    _mm256_maskstore_ps(weights + e, some, p);
    _mm256_maskstore_ps(scores + e, some, g);
  }
  add_gathered(d, scores, k, keys, count, grad_q);
}

}  // namespace drrl::cpu

#else  // another processor: the callers fall back on PyTorch's kernels

namespace drrl::cpu {
bool kernel_available() {
  return false;
}
int64_t Shape::query_blocks() const {
  return 0;
}
int64_t Shape::key_blocks() const {
  return 0;
}
int64_t packed_size(const Shape&) {
  return 0;
}
void pack(const Shape&, Matrix<const float>, Matrix<const float>, float*) {}
int64_t forward_scratch_size(const Shape&) {
  return 0;
}
void forward_block(const Shape&, Matrix<const float>, const float*, Matrix<float>, Matrix<float>,
                   int64_t, int64_t, float*) {}
int64_t query_block_rows() {
  return 1;
}
int64_t forward_rows_scratch_size(int64_t) {
  return 0;
}
void forward_rows(int64_t, int64_t, float, const float*, int64_t, const Part*, int64_t, float*,
                  int64_t, float*, int64_t, ExactList*, float*) {}
void exact_row_backward(int64_t, float, const float*, const float*, float, float, const int32_t*,
                        int64_t, const float*, const float*, float*, float*, float*) {}
void add_gathered(int64_t, const float*, const float*, const int32_t*, int64_t, float*) {}
void pack_matrix(const float*, int64_t, int64_t, int64_t, float*) {}
void pack_transposed(const float*, int64_t, int64_t, int64_t, float*) {}
void multiply(int64_t, int64_t, int64_t, const float*, int64_t, const float*, float*, int64_t,
              bool) {}
void corrections(int64_t, int64_t, int64_t, const float*, int64_t, const float*, float*, float*) {}
void add_rows(int64_t, int64_t, const float*, int64_t, float*, int64_t) {}
void add_gram(int64_t, int64_t, const float*, int64_t, const float*, float*, float*) {}
int64_t key_chunk_rows() {
  return 1;
}
void pack_chunk(const Shape&, const float*, int64_t, const float*, int64_t, int64_t, float*) {}
int64_t packed_queries_size(const Shape&) {
  return 0;
}
void pack_queries(const Shape&, const BackwardOperands&, int64_t, float*) {}
int64_t backward_scratch_size(const Shape&) {
  return 0;
}
void backward_block(const Shape&, const BackwardOperands&, const float*, int64_t, const Order&,
                    float*) {}
}  // namespace drrl::cpu

#endif
