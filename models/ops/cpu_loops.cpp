#include "models/ops/cpu_loops.h"

#include <bit>
#include <cmath>
#include <initializer_list>
#include <limits>

// Every loop here is written so that the compiler vectorizes it: `omp simd` (compiled with
// -fopenmp-simd) permits the reordering of sums that this takes, and nothing else of -ffast-math.

namespace drrl::loops {
namespace {

inline float load(float x) {
  return x;
}
inline double load(double x) {
  return x;
}
inline float load(Bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

inline void store(float& to, float x) {
  to = x;
}
inline void store(double& to, double x) {
  to = x;
}
inline void store(Bf16& to, float x) {  // round to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// Cephes' expf: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial for e^r, 2^n by its bits. Relative
// error below 2e-7. Saturates at 2^127.4 and 2^-126 instead of overflowing; NaN stays NaN.
inline float exponential(float x) {
  constexpr float kLow = -87.33654f, kHigh = 88.3f,
                  kRound = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
  x = x < kLow ? kLow : x;
  x = x > kHigh ? kHigh : x;
  const float shifted = x * 1.44269504088896341f + kRound;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float e = p * (r * r) + r + 1.0f;
  return e * std::bit_cast<float>((exponent + 127) << 23);
}
inline double exponential(double x) {
  return std::exp(x);
}

}  // namespace

bool supported() {
#if defined(__AVX2__) && (defined(__x86_64__) || defined(__i386__))
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

template <typename T>
void rms_norm_forward(const T* x, const Acc<T>* weight, T* y, Acc<T>* rstd, int64_t rows, int64_t n,
                      double eps) {
  for (int64_t row = 0; row < rows; ++row, x += n, y += n) {
    Acc<T> squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; ++i) {
      squares += load(x[i]) * load(x[i]);
    }
    const Acc<T> scale = Acc<T>(1) / std::sqrt(squares / Acc<T>(n) + Acc<T>(eps));
    rstd[row] = scale;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      store(y[i], load(x[i]) * scale * weight[i]);
    }
  }
}

template <typename T>
void rms_norm_backward(const T* dy, const T* dh, const T* x, const Acc<T>* weight,
                       const Acc<T>* rstd, T* dx, Acc<T>* d_weight, int64_t rows, int64_t n) {
  for (int64_t row = 0; row < rows; ++row, dy += n, x += n, dx += n) {
    const Acc<T> scale = rstd[row];
    Acc<T> dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < n; ++i) {
      dot += load(dy[i]) * weight[i] * load(x[i]);
    }
    const Acc<T> pull = dot * scale * scale * scale / Acc<T>(n);
    if (dh != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        store(dx[i], load(dh[i]) + load(dy[i]) * weight[i] * scale - load(x[i]) * pull);
      }
      dh += n;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        store(dx[i], load(dy[i]) * weight[i] * scale - load(x[i]) * pull);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      d_weight[i] += load(dy[i]) * load(x[i]) * scale;
    }
  }
}

template <typename T>
void rope_split_forward(const T* qkv, const float* cos, const float* sin, Heads<T> q, Heads<T> k,
                        Heads<T> v, int64_t length, int64_t d, int64_t begin, int64_t end) {
  const int64_t half = d / 2;
  const int64_t width = (q.heads + k.heads + v.heads) * d;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / length;
    const int64_t t = token % length;
    const float* c = cos + t * half;
    const float* s = sin + t * half;
    const T* from = qkv + token * width;
    for (const Heads<T>& rotated : {q, k}) {
      for (int64_t h = 0; h < rotated.heads; ++h, from += d) {
        T* to = rotated.data + b * rotated.batch + h * rotated.head + t * rotated.token;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const Acc<T> first = load(from[i]);
          const Acc<T> second = load(from[i + half]);
          store(to[i], first * c[i] - second * s[i]);
          store(to[i + half], second * c[i] + first * s[i]);
        }
      }
    }
    for (int64_t h = 0; h < v.heads; ++h, from += d) {
      T* to = v.data + b * v.batch + h * v.head + t * v.token;
      for (int64_t i = 0; i < d; ++i) {
        to[i] = from[i];
      }
    }
  }
}

template <typename T>
void rope_split_backward(T* d_qkv, const float* cos, const float* sin, Heads<const T> dq,
                         Heads<const T> dk, Heads<const T> dv, int64_t length, int64_t d,
                         int64_t begin, int64_t end) {
  const int64_t half = d / 2;
  const int64_t width = (dq.heads + dk.heads + dv.heads) * d;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / length;
    const int64_t t = token % length;
    const float* c = cos + t * half;
    const float* s = sin + t * half;
    T* to = d_qkv + token * width;
    for (const Heads<const T>& rotated : {dq, dk}) {
      for (int64_t h = 0; h < rotated.heads; ++h, to += d) {
        const T* from = rotated.data + b * rotated.batch + h * rotated.head + t * rotated.token;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const Acc<T> first = load(from[i]);
          const Acc<T> second = load(from[i + half]);
          store(to[i], first * c[i] + second * s[i]);
          store(to[i + half], second * c[i] - first * s[i]);
        }
      }
    }
    for (int64_t h = 0; h < dv.heads; ++h, to += d) {
      const T* from = dv.data + b * dv.batch + h * dv.head + t * dv.token;
      for (int64_t i = 0; i < d; ++i) {
        to[i] = from[i];
      }
    }
  }
}

template <typename T>
void swiglu_forward(const T* gate_up, T* y, int64_t rows, int64_t n) {
  for (int64_t row = 0; row < rows; ++row, gate_up += 2 * n, y += n) {
    const T* up = gate_up + n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Acc<T> g = load(gate_up[i]);
      store(y[i], g / (Acc<T>(1) + exponential(-g)) * load(up[i]));
    }
  }
}

template <typename T>
void swiglu_backward(const T* gate_up, const T* dy, T* d_gate_up, T* y, int64_t rows, int64_t n) {
  for (int64_t row = 0; row < rows; ++row, gate_up += 2 * n, d_gate_up += 2 * n, dy += n, y += n) {
    const T* up = gate_up + n;
    T* d_up = d_gate_up + n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Acc<T> g = load(gate_up[i]);
      const Acc<T> u = load(up[i]);
      const Acc<T> d = load(dy[i]);
      const Acc<T> sigmoid = Acc<T>(1) / (Acc<T>(1) + exponential(-g));
      const Acc<T> silu = g * sigmoid;
      store(y[i], silu * u);
      store(d_up[i], d * silu);
      store(d_gate_up[i], d * u * (sigmoid + silu * (Acc<T>(1) - sigmoid)));
    }
  }
}

template <typename T>
void exp_row(T* row, int64_t n, Acc<T>* max, Acc<T>* sum) {
  Acc<T> largest = -std::numeric_limits<Acc<T>>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    largest = load(row[i]) > largest ? load(row[i]) : largest;
  }
  Acc<T> total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const Acc<T> e = exponential(load(row[i]) - largest);
    store(row[i], e);
    total += e;
  }
  *max = largest;
  *sum = total;
}

template <typename T>
void scale_row(T* row, int64_t n, Acc<T> factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    store(row[i], load(row[i]) * factor);
  }
}

template <typename T>
void scatter_add(const T* x, const int64_t* ids, int64_t tokens, Acc<T>* table, int64_t first,
                 int64_t rows, int64_t n, int64_t begin, int64_t end) {
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t id = ids[token] - first;
    if (id < 0 || id >= rows) {
      continue;
    }
    const T* from = x + token * n;
    Acc<T>* to = table + id * n;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      to[i] += load(from[i]);
    }
  }
}

#define DRRL_INSTANTIATE_LOOPS(T)                                                                 \
  template void rms_norm_forward<T>(const T*, const Acc<T>*, T*, Acc<T>*, int64_t, int64_t,       \
                                    double);                                                      \
  template void rms_norm_backward<T>(const T*, const T*, const T*, const Acc<T>*, const Acc<T>*,  \
                                     T*, Acc<T>*, int64_t, int64_t);                              \
  template void rope_split_forward<T>(const T*, const float*, const float*, Heads<T>, Heads<T>,   \
                                      Heads<T>, int64_t, int64_t, int64_t, int64_t);              \
  template void rope_split_backward<T>(T*, const float*, const float*, Heads<const T>,            \
                                       Heads<const T>, Heads<const T>, int64_t, int64_t, int64_t, \
                                       int64_t);                                                  \
  template void swiglu_forward<T>(const T*, T*, int64_t, int64_t);                                \
  template void swiglu_backward<T>(const T*, const T*, T*, T*, int64_t, int64_t);                 \
  template void exp_row<T>(T*, int64_t, Acc<T>*, Acc<T>*);                                        \
  template void scale_row<T>(T*, int64_t, Acc<T>);                                                \
  template void scatter_add<T>(const T*, const int64_t*, int64_t, Acc<T>*, int64_t, int64_t,      \
                               int64_t, int64_t, int64_t)

DRRL_INSTANTIATE_LOOPS(float);
DRRL_INSTANTIATE_LOOPS(double);
DRRL_INSTANTIATE_LOOPS(Bf16);
#undef DRRL_INSTANTIATE_LOOPS

}  // namespace drrl::loops
