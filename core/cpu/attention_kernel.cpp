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

inline float largest_of(const float* x, int64_t count) {  // a multiple of 8
  __m256 top = _mm256_loadu_ps(x);
  for (int64_t j = 8; j < count; j += 8) {
    top = _mm256_max_ps(top, _mm256_loadu_ps(x + j));
  }
  return largest(top);
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
      if (part_.drop > 0) {
        decide_tiles();
      }
      for (int64_t i = 0; i < rows_; ++i) {
        weigh(i);
      }
      if (part_.drop > 0) {
        add_kept_values(values);
      } else {
        product<false, true>(rows_, part_.v, seen, scores_, kScoreStride, values, count_, to_.sum,
                             part_.v);
      }
    }
  }

 private:
  float* row_of(int64_t i) const { return scores_ + i * kScoreStride; }
  int64_t visible_to(int64_t i) const {
    return std::clamp<int64_t>(part_.visible + i - begin_, 0, count_);
  }

  // The row's scores <- -infinity where it sees no key, and in tiles that it does not keep.
  void mask(int64_t i) const {
    if (const int64_t n = visible_to(i); n < used_) {
      std::fill(row_of(i) + n, row_of(i) + used_, -std::numeric_limits<float>::infinity());
    }
    for (int64_t tile = 0; part_.drop > 0 && tile < tiles(); ++tile) {
      if (!keeps(i, tile)) {
        std::fill_n(row_of(i) + tile * kKeysOfTile, kKeysOfTile,
                    -std::numeric_limits<float>::infinity());
      }
    }
  }

  int64_t tiles() const { return count_ / kKeysOfTile; }
  bool keeps(int64_t i, int64_t tile) const {
    return (kept_[static_cast<std::size_t>(i)] >> tile & 1U) != 0;
  }

  // Which of the chunk's tiles each row needs, by its scores and what it has met, and keeps.
  void decide_tiles() {
    uint8_t& needed_before = part_.needed[begin_ / kKeyBlock];
    const float log_drop = std::log(part_.drop);
    for (int64_t first = 0; first < rows_; first += kRowsOfTile) {
      uint8_t needed = 0;  // by a row of the tile so far
      uint8_t* kept_from = part_.kept_from + first / kRowsOfTile * part_.kept_stride +
                           begin_ / kKeysOfTile;
      std::fill_n(kept_from, tiles(), static_cast<uint8_t>(kRowsOfTile));
      for (int64_t i = first; i < std::min(rows_, first + kRowsOfTile); ++i) {
        const float least = to_.maximum[i] + std::log(to_.total[i]) + log_drop - correction_[i];
        for (int64_t tile = 0; tile < tiles(); ++tile) {
          const bool needs = largest_of(row_of(i) + tile * kKeysOfTile, kKeysOfTile) * scale_ >=
                             least;
          needed = static_cast<uint8_t>(needed | (needs ? 1U << tile : 0U));
        }
        const auto kept = static_cast<uint8_t>(needed | needed_before);
        kept_[static_cast<std::size_t>(i)] = kept;
        for (int64_t tile = 0; tile < tiles(); ++tile) {
          if ((kept >> tile & 1U) != 0 && kept_from[tile] == kRowsOfTile) {
            kept_from[tile] = static_cast<uint8_t>(i - first);
          }
        }
      }
      needed_before = needed;
    }
  }

  // Values of tiles that some row of a tile of rows keeps, neighbouring tiles of rows at once.
  void add_kept_values(const float* values) const {
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      const auto kept_by_last = [&](int64_t first) {
        return keeps(std::min(rows_, first + kRowsOfTile) - 1, tile);  // who keeps it, to the last
      };
      for (int64_t first = 0; first < rows_;) {
        int64_t end = first;
        while (end < rows_ && kept_by_last(end)) {
          end = std::min(rows_, end + kRowsOfTile);
        }
        if (end > first) {
          product<false, true>(
              end - first, part_.v, kKeysOfTile, row_of(first) + tile * kKeysOfTile, kScoreStride,
              values + tile * kKeysOfTile * kWidth, count_, to_.sum + first * part_.v, part_.v);
        }
        first = std::max(end, first + kRowsOfTile);
      }
    }
  }

  // The row's scores <- exp(score - shift), where shift is `maximum` less the row's correction.
  // Returns their sum.
  float to_weights(int64_t i, float maximum) const {
    float* row = row_of(i);
    const Exponent exponent = exponent_of(row, used_, scale_, maximum - correction_[i], 0);
    __m256 sum = _mm256_setzero_ps();
    const auto weigh_keys = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j += 8) {
        const __m256 e = exponential(
            _mm256_fmsub_ps(_mm256_loadu_ps(row + j), exponent.by, exponent.less));
        _mm256_storeu_ps(row + j, e);
        sum = _mm256_add_ps(sum, e);
      }
    };
    if (part_.drop <= 0) {
      weigh_keys(0, used_);
      return sum_of(sum);
    }
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      const int64_t begin = tile * kKeysOfTile;
      if (keeps(i, tile)) {
        weigh_keys(begin, begin + kKeysOfTile);
      } else {
        std::fill_n(row + begin, kKeysOfTile, 0.0F);
      }
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
    if (part_.drop > 0 && kept_[static_cast<std::size_t>(i)] == 0) {
      std::fill(row, row + used_, 0.0F);
      return;
    }
    mask(i);
    const float largest_here = largest_of(row, used_) * scale_ + correction_[i];
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
  std::array<uint8_t, kQueryBlock> kept_;     // of each row a bit for each tile of the chunk
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

namespace {

// One key block of a problem in a backward pass.
class KeyBlockBackward {
 public:
  KeyBlockBackward(const Shape& shape, const BackwardOperands& x, const float* packed_queries,
                   int64_t block, float* scratch)
      : shape_(shape),
        x_(x),
        packed_queries_(packed_queries),
        begin_(block * kKeyBlock),
        count_(std::min(kKeyBlock, shape.keys - begin_)),
        keys_by_row_(scratch),
        values_by_row_(keys_by_row_ + kKeyBlock * shape.qk),
        keys_by_column_(values_by_row_ + kKeyBlock * shape.v),
        grad_k_(keys_by_column_ + kKeyBlock * shape.qk),
        grad_v_(grad_k_ + kKeyBlock * shape.qk),
        weights_(grad_v_ + kKeyBlock * shape.v),
        grads_(weights_ + kQueryBlock * kScoreStride) {
    pack_rows(x.k.at(0, begin_), x.k.row, count_, shape.qk, keys_by_row_);
    pack_rows(x.v.at(0, begin_), x.v.row, count_, shape.v, values_by_row_);
    pack_columns(x.k.at(0, begin_), x.k.row, count_, shape.qk, keys_by_column_);
    std::fill(grad_k_, grad_k_ + count_ * shape.qk, 0.0f);
    std::fill(grad_v_, grad_v_ + count_ * shape.v, 0.0f);
  }

  void run(const Order& order, int64_t block) {
    for (int64_t head = 0; head < shape_.heads; ++head) {
      for (int64_t qb = first_query_block(shape_, block); qb < shape_.query_blocks(); ++qb) {
        choose(head, qb * kQueryBlock);
        for (const Piece& piece : pieces_) {
          weigh(head, qb * kQueryBlock, piece);
          add_keys_gradients(head, qb * kQueryBlock, piece);
        }
        order.turn(order.context, order.key_block, head, qb);
        for (const Piece& p : pieces_) {
          product<false, true>(p.rows, shape_.qk, p.keys, grads_ + p.row * kScoreStride + p.key,
                               kScoreStride, keys_by_column_ + p.key * kWidth, count_,
                               x_.grad_q.at(head, qb * kQueryBlock + p.row), x_.grad_q.row);
        }
        order.done(order.context, order.key_block, head, qb);
      }
    }
    for (int64_t j = 0; j < count_; ++j) {
      std::memcpy(x_.grad_k.at(0, begin_ + j), grad_k_ + j * shape_.qk,
                  static_cast<size_t>(shape_.qk) * sizeof(float));
      std::memcpy(x_.grad_v.at(0, begin_ + j), grad_v_ + j * shape_.v,
                  static_cast<size_t>(shape_.v) * sizeof(float));
    }
  }

 private:
  // Rows of the query block and keys of the key block that are worked on together.
  struct Piece {
    int64_t row, rows, key, keys;
  };

  int64_t rows_from(int64_t first) const { return std::min(kQueryBlock, shape_.queries - first); }

  // pieces_ <- what of the query block from row `first` on has weight: all that is visible, or the
  // tiles that are kept.
  void choose(int64_t head, int64_t first) {
    const int64_t rows = rows_from(first);
    pieces_.clear();
    if (x_.kept.kept_from == nullptr) {
      pieces_.push_back(
          {0, rows, 0,
           shape_.causal ? std::min(count_, shape_.offset + first + rows - begin_) : count_});
      return;
    }
    for (int64_t tile = 0; tile < count_ / kKeysOfTile; ++tile) {
      int64_t begin = 0;  // of neighbouring tiles of rows that keep it
      for (int64_t row = 0; row < rows; row += kRowsOfTile) {
        if (kept_from(head, first + row, tile) == kRowsOfTile) {
          add_piece(begin, row, tile);
          begin = row + kRowsOfTile;
        }
      }
      add_piece(begin, rows, tile);
    }
  }
  void add_piece(int64_t begin, int64_t end, int64_t tile) {
    if (end > begin) {
      pieces_.push_back({begin, end - begin, tile * kKeysOfTile, kKeysOfTile});
    }
  }
  int64_t kept_from(int64_t head, int64_t row, int64_t tile) const {
    return x_.kept.kept_from[head * x_.kept.head + row / kRowsOfTile * x_.kept.stride +
                             begin_ / kKeysOfTile + tile];
  }

  // weights_, grads_ of the piece <- softmax weights, gradients of the scores.
  void weigh(int64_t head, int64_t first, const Piece& p) const {
    const int64_t used = (p.keys + kWidth - 1) / kWidth * kWidth;
    product<false, false>(p.rows, used, shape_.qk, x_.q.at(head, first + p.row), x_.q.row,
                          keys_by_row_ + p.key * shape_.qk, shape_.qk, at(weights_, p),
                          kScoreStride);
    product<false, false>(p.rows, used, shape_.v, x_.grad_out.at(head, first + p.row),
                          x_.grad_out.row, values_by_row_ + p.key * shape_.v, shape_.v,
                          at(grads_, p), kScoreStride);
    const __m256 scale = _mm256_set1_ps(shape_.scale);
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t row = first + p.row + i;
      float* w = at(weights_, p) + i * kScoreStride;
      float* g = at(grads_, p) + i * kScoreStride;
      if (x_.kept.kept_from != nullptr &&
          row % kRowsOfTile < kept_from(head, row, p.key / kKeysOfTile)) {
        std::fill_n(w, used, 0.0F);
        std::fill_n(g, used, 0.0F);
        continue;
      }
      const int64_t n = std::clamp<int64_t>(visible(shape_, row, begin_, count_) - p.key, 0,
                                            p.keys);
      std::fill(w + n, w + used, -std::numeric_limits<float>::infinity());
      const Exponent exponent = exponent_of(w, used, shape_.scale, *x_.logsumexp.at(head, row), 0);
      const __m256 delta = _mm256_set1_ps(*x_.delta.at(head, row));
      for (int64_t j = 0; j < used; j += 8) {
        const __m256 weight = exponential(
            _mm256_fmsub_ps(_mm256_loadu_ps(w + j), exponent.by, exponent.less));
        _mm256_storeu_ps(w + j, weight);
        const __m256 grad = _mm256_mul_ps(_mm256_mul_ps(weight, scale),
                                          _mm256_sub_ps(_mm256_loadu_ps(g + j), delta));
        _mm256_storeu_ps(g + j, grad);
      }
      if (x_.skip.begin != nullptr) {
        skip(head, row, static_cast<int32_t>(x_.skip.first_key + begin_ + p.key), used, w, g);
      }
    }
  }

  // Entries that are exact, among `used` keys from `from` on, have no weight here.
  void skip(int64_t head, int64_t row, int32_t from, int64_t used, float* w, float* g) const {
    const int64_t* list = x_.skip.begin + head * x_.skip.head + row;
    const int32_t* last = x_.skip.keys + list[1];
    for (const int32_t* key = std::lower_bound(x_.skip.keys + list[0], last, from);
         key != last && *key < from + used; ++key) {
      w[*key - from] = 0;
      g[*key - from] = 0;
    }
  }

  void add_keys_gradients(int64_t head, int64_t first, const Piece& p) const {
    const int64_t rows = rows_from(first);
    const float* q = packed_queries_ + (head * shape_.queries + first) * (shape_.qk + shape_.v);
    const float* grad_out = q + rows * shape_.qk;
    product<true, true>(p.keys, shape_.v, p.rows, at(weights_, p), kScoreStride,
                        grad_out + p.row * kWidth, rows, grad_v_ + p.key * shape_.v, shape_.v);
    product<true, true>(p.keys, shape_.qk, p.rows, at(grads_, p), kScoreStride, q + p.row * kWidth,
                        rows, grad_k_ + p.key * shape_.qk, shape_.qk);
  }

  static float* at(float* matrix, const Piece& p) { return matrix + p.row * kScoreStride + p.key; }

  const Shape& shape_;
  const BackwardOperands& x_;
  const float* packed_queries_;
  int64_t begin_, count_;
  float* keys_by_row_;     // K^T in panels of keys
  float* values_by_row_;   // V^T likewise
  float* keys_by_column_;  // K in panels of columns
  float* grad_k_;          // [count][qk]
  float* grad_v_;          // [count][v]
  float* weights_;         // scores, then softmax weights
  float* grads_;           // of the weights, then of the scores
  std::vector<Piece> pieces_;
};

}  // namespace

void backward_block(const Shape& shape, const BackwardOperands& x, const float* packed_queries,
                    int64_t block, const Order& order, float* scratch) {
  KeyBlockBackward(shape, x, packed_queries, block, scratch).run(order, block);
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
