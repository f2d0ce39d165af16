#include <algorithm>
#include <initializer_list>

#include "core/cuda/numbers.h"
#include "models/ops/cpu_loops.h"
#include "models/ops/cuda/fused_ops_kernel.h"

namespace drrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowThreads = 1024;  // for rows as long as a vocabulary
constexpr int64_t kMostStripes = 1024;
constexpr int64_t kSharedBytes = 40 *
                                 1024;  // of the 48 KiB that every device gives without being asked

using loops::Acc;  // what a dtype is computed in

// N neighbours that are moved at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};
template <typename T, int N>
__device__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <typename T, int N>
__device__ void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// The sum, or the largest, of one value a thread, known to all threads. `scratch` holds one value a
// warp.
struct Sum {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};
struct Largest {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return a > b ? a : b;
  }
};
template <int Threads, typename A, typename Combine>
__device__ A reduce(A value, A none, A* scratch, Combine combine) {
  for (int step = 16; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  __syncthreads();  // whoever still reads the last result
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = value;
  }
  __syncthreads();
  value = threadIdx.x % 32 < Threads / 32 ? scratch[threadIdx.x % 32] : none;
  for (int step = 16; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  return value;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    rms_norm(const T* __restrict__ x, const Acc<T>* __restrict__ weight, T* __restrict__ y,
             Acc<T>* __restrict__ rstd, int64_t n, double eps) {
  using A = Acc<T>;
  __shared__ A scratch[32];
  const int64_t row = blockIdx.x;
  const T* from = x + row * n;
  A square = 0;
  for (int64_t i = threadIdx.x * N; i < n; i += kThreads * N) {
    const auto a = load<T, N>(from + i);
    for (int j = 0; j < N; ++j) {
      square += widen(a.at[j]) * widen(a.at[j]);
    }
  }
  const A r = rsqrt(reduce<kThreads>(square, A(0), scratch, Sum()) / static_cast<A>(n) +
                    static_cast<A>(eps));
  if (threadIdx.x == 0) {
    rstd[row] = r;
  }
  for (int64_t i = threadIdx.x * N; i < n; i += kThreads * N) {
    auto a = load<T, N>(from + i);
    for (int j = 0; j < N; ++j) {
      a.at[j] = narrow<T>(widen(a.at[j]) * r * weight[i + j]);
    }
    store(y + row * n + i, a);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    rms_norm_backward(const T* __restrict__ dy, const T* __restrict__ dh, const T* __restrict__ x,
                      const Acc<T>* __restrict__ weight, const Acc<T>* __restrict__ rstd,
                      T* __restrict__ dx, Acc<T>* __restrict__ d_weight, int64_t rows, int64_t n) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* own = reinterpret_cast<A*>(shared);  // [n], each element of one thread
  __shared__ A scratch[32];
  for (int64_t i = threadIdx.x * N; i < n; i += kThreads * N) {
    for (int j = 0; j < N; ++j) {
      own[i + j] = 0;
    }
  }
  const int64_t each = (rows + gridDim.x - 1) / gridDim.x, end = min(rows, (blockIdx.x + 1) * each);
  for (int64_t row = blockIdx.x * each; row < end; ++row) {
    const int64_t at = row * n;
    A dot = 0;
    for (int64_t i = threadIdx.x * N; i < n; i += kThreads * N) {
      const auto a = load<T, N>(x + at + i), b = load<T, N>(dy + at + i);
      for (int j = 0; j < N; ++j) {
        dot += widen(b.at[j]) * weight[i + j] * widen(a.at[j]);
      }
    }
    const A r = rstd[row];
    const A back = r * r * r * reduce<kThreads>(dot, A(0), scratch, Sum()) / static_cast<A>(n);
    for (int64_t i = threadIdx.x * N; i < n; i += kThreads * N) {
      const auto a = load<T, N>(x + at + i), b = load<T, N>(dy + at + i);
      Pack<T, N> h = {}, to;
      if (dh != nullptr) {
        h = load<T, N>(dh + at + i);
      }
      for (int j = 0; j < N; ++j) {
        const A xj = widen(a.at[j]), g = widen(b.at[j]);
        own[i + j] += g * xj * r;
        const A gradient = g * weight[i + j] * r - xj * back;
        to.at[j] = narrow<T>(dh != nullptr ? gradient + widen(h.at[j]) : gradient);
      }
      store(dx + at + i, to);
    }
  }
  for (int64_t i = threadIdx.x * N; i < n; i += kThreads * N) {
    for (int j = 0; j < N; ++j) {
      d_weight[blockIdx.x * n + i + j] = own[i + j];
    }
  }
}

// One block a token.
template <typename T, int N, bool Backward>
__global__ void __launch_bounds__(kThreads)
    rope_split(T* __restrict__ qkv, const float* __restrict__ cos, const float* __restrict__ sin,
               OpHeads q, OpHeads k, OpHeads v, int64_t length, int64_t d) {
  const int64_t token = blockIdx.x, b = token / length, t = token % length;
  const int half = static_cast<int>(d / 2), packs = half / N;
  const int heads = static_cast<int>(q.heads + k.heads + v.heads);
  for (int item = static_cast<int>(threadIdx.x); item < heads * packs; item += kThreads) {
    const int head = item / packs, i = item % packs * N;
    const OpHeads& of = head < q.heads ? q : head < q.heads + k.heads ? k : v;
    const int64_t own = head < q.heads             ? head
                        : head < q.heads + k.heads ? head - q.heads
                                                   : head - q.heads - k.heads;
    T* in_row = qkv + (token * heads + head) * d + i;
    T* in_head = static_cast<T*>(of.data) + b * of.batch + own * of.head + t * of.token + i;
    const T* from = Backward ? in_head : in_row;
    T* to = Backward ? in_row : in_head;
    auto x = load<T, N>(from), y = load<T, N>(from + half);
    if (head < q.heads + k.heads) {
      for (int j = 0; j < N; ++j) {
        using A = Acc<T>;
        const A c = cos[t * half + i + j],
                s = Backward ? -sin[t * half + i + j] : sin[t * half + i + j];
        const A first = widen(x.at[j]), second = widen(y.at[j]);
        x.at[j] = narrow<T>(first * c - second * s);
        y.at[j] = narrow<T>(second * c + first * s);
      }
    }
    store(to, x);
    store(to + half, y);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu(const T* __restrict__ gate_up, T* __restrict__ y, int64_t packs, int64_t n) {
  using A = Acc<T>;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; p < packs;
       p += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = p * N / n, i = p * N % n;
    auto gate = load<T, N>(gate_up + row * 2 * n + i);
    const auto up = load<T, N>(gate_up + row * 2 * n + n + i);
    for (int j = 0; j < N; ++j) {
      const A a = widen(gate.at[j]);
      gate.at[j] = narrow<T>(a / (1 + exp(-a)) * widen(up.at[j]));
    }
    store(y + row * n + i, gate);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward(const T* __restrict__ gate_up, const T* __restrict__ dy,
                    T* __restrict__ d_gate_up, T* __restrict__ y, int64_t packs, int64_t n) {
  using A = Acc<T>;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; p < packs;
       p += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = p * N / n, i = p * N % n;
    const auto gate = load<T, N>(gate_up + row * 2 * n + i),
               up = load<T, N>(gate_up + row * 2 * n + n + i), g = load<T, N>(dy + row * n + i);
    Pack<T, N> d_gate, d_up, out;
    for (int j = 0; j < N; ++j) {
      const A a = widen(gate.at[j]), u = widen(up.at[j]), dyj = widen(g.at[j]);
      const A sigmoid = 1 / (1 + exp(-a)), silu = a * sigmoid;
      d_gate.at[j] = narrow<T>(dyj * u * (sigmoid + silu * (1 - sigmoid)));
      d_up.at[j] = narrow<T>(dyj * silu);
      out.at[j] = narrow<T>(silu * u);
    }
    store(d_gate_up + row * 2 * n + i, d_gate);
    store(d_gate_up + row * 2 * n + n + i, d_up);
    store(y + row * n + i, out);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kRowThreads)
    exp_rows(T* __restrict__ x, int64_t stride, Acc<T>* __restrict__ max, Acc<T>* __restrict__ sum,
             int64_t n) {
  using A = Acc<T>;
  __shared__ A scratch[32];
  T* row = x + blockIdx.x * stride;
  A top = widen(row[0]), total = 0;
  for (int64_t i = threadIdx.x * N; i < n; i += kRowThreads * N) {
    const auto a = load<T, N>(row + i);
    for (int j = 0; j < N; ++j) {
      top = Largest()(top, static_cast<A>(widen(a.at[j])));
    }
  }
  top = reduce<kRowThreads>(top, top, scratch, Largest());
  for (int64_t i = threadIdx.x * N; i < n; i += kRowThreads * N) {
    auto a = load<T, N>(row + i);
    for (int j = 0; j < N; ++j) {
      const A e = exp(widen(a.at[j]) - top);
      total += e;
      a.at[j] = narrow<T>(e);
    }
    store(row + i, a);
  }
  total = reduce<kRowThreads>(total, A(0), scratch, Sum());
  if (threadIdx.x == 0) {
    max[blockIdx.x] = top;
    sum[blockIdx.x] = total;
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kRowThreads)
    scale_rows(T* __restrict__ x, int64_t stride, const Acc<T>* __restrict__ factor, int64_t n) {
  T* row = x + blockIdx.x * stride;
  const Acc<T> f = factor[blockIdx.x];
  for (int64_t i = threadIdx.x * N; i < n; i += kRowThreads * N) {
    auto a = load<T, N>(row + i);
    for (int j = 0; j < N; ++j) {
      a.at[j] = narrow<T>(widen(a.at[j]) * f);
    }
    store(row + i, a);
  }
}

// f<T, N>() for the element, with N neighbours in 16 bytes if all counts of elements are multiples
// of N and all pointers are at such bytes, else with N = 1.
template <typename F>
cudaError_t with_pack(OpElement element, std::initializer_list<int64_t> counts,
                      std::initializer_list<const void*> pointers, F f) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    constexpr int kNeighbours = 16 / sizeof(T);
    const bool packed = std::all_of(counts.begin(), counts.end(),
                                    [](int64_t n) { return n % kNeighbours == 0; }) &&
                        std::all_of(pointers.begin(), pointers.end(), [](const void* p) {
                          return reinterpret_cast<uintptr_t>(p) % 16 == 0;
                        });
    if (packed) {
      f(zero, std::integral_constant<int, kNeighbours>());
    } else {
      f(zero, std::integral_constant<int, 1>());
    }
  };
  switch (element) {
    case OpElement::kFloat: typed(float()); break;
    case OpElement::kDouble: typed(double()); break;
    case OpElement::kBFloat16: typed(__nv_bfloat16()); break;
  }
  return cudaGetLastError();
}

int64_t accumulator_bytes(OpElement element) {
  return element == OpElement::kDouble ? 8 : 4;
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::min<int64_t>((threads + kThreads - 1) / kThreads, 1 << 20));
}

}  // namespace

cudaError_t launch_rms_norm(OpElement element, const void* x, const void* weight, void* y,
                            void* rstd, int64_t rows, int64_t n, double eps, cudaStream_t stream) {
  return with_pack(element, {n}, {x, y}, [&](auto zero, auto width) {
    using T = decltype(zero);
    rms_norm<T, width.value><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
        static_cast<const T*>(x), static_cast<const Acc<T>*>(weight), static_cast<T*>(y),
        static_cast<Acc<T>*>(rstd), n, eps);
  });
}

int64_t norm_stripes(int64_t rows) {
  return std::min(rows, kMostStripes);
}
int64_t longest_norm_row(OpElement element) {
  return kSharedBytes / accumulator_bytes(element);
}

cudaError_t launch_rms_norm_backward(OpElement element, const void* dy, const void* dh,
                                     const void* x, const void* weight, const void* rstd, void* dx,
                                     void* d_weight, int64_t rows, int64_t n, cudaStream_t stream) {
  return with_pack(element, {n}, {dy, dh, x, dx}, [&](auto zero, auto width) {
    using T = decltype(zero);
    using A = Acc<T>;
    rms_norm_backward<T, width.value>
        <<<static_cast<unsigned>(norm_stripes(rows)), kThreads,
           static_cast<size_t>(n * accumulator_bytes(element)), stream>>>(
            static_cast<const T*>(dy), static_cast<const T*>(dh), static_cast<const T*>(x),
            static_cast<const A*>(weight), static_cast<const A*>(rstd), static_cast<T*>(dx),
            static_cast<A*>(d_weight), rows, n);
  });
}

cudaError_t launch_rope_split(OpElement element, bool backward, void* qkv, const float* cos,
                              const float* sin, OpHeads q, OpHeads k, OpHeads v, int64_t tokens,
                              int64_t length, int64_t d, cudaStream_t stream) {
  return with_pack(
      element,
      {d / 2, q.batch, q.head, q.token, k.batch, k.head, k.token, v.batch, v.head, v.token},
      {qkv, q.data, k.data, v.data}, [&](auto zero, auto width) {
        using T = decltype(zero);
        const auto kernel = backward ? rope_split<T, width.value, true>
                                     : rope_split<T, width.value, false>;
        kernel<<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(static_cast<T*>(qkv), cos,
                                                                       sin, q, k, v, length, d);
      });
}

cudaError_t launch_swiglu(OpElement element, const void* gate_up, void* y, int64_t rows, int64_t n,
                          cudaStream_t stream) {
  return with_pack(element, {n}, {gate_up, y}, [&](auto zero, auto width) {
    using T = decltype(zero);
    const int64_t packs = rows * n / width.value;
    swiglu<T, width.value><<<blocks_for(packs), kThreads, 0, stream>>>(
        static_cast<const T*>(gate_up), static_cast<T*>(y), packs, n);
  });
}

cudaError_t launch_swiglu_backward(OpElement element, const void* gate_up, const void* dy,
                                   void* d_gate_up, void* y, int64_t rows, int64_t n,
                                   cudaStream_t stream) {
  return with_pack(element, {n}, {gate_up, dy, d_gate_up, y}, [&](auto zero, auto width) {
    using T = decltype(zero);
    const int64_t packs = rows * n / width.value;
    swiglu_backward<T, width.value><<<blocks_for(packs), kThreads, 0, stream>>>(
        static_cast<const T*>(gate_up), static_cast<const T*>(dy), static_cast<T*>(d_gate_up),
        static_cast<T*>(y), packs, n);
  });
}

cudaError_t launch_exp_rows(OpElement element, void* x, int64_t stride, void* max, void* sum,
                            int64_t rows, int64_t n, cudaStream_t stream) {
  return with_pack(element, {n, stride}, {x}, [&](auto zero, auto width) {
    using T = decltype(zero);
    exp_rows<T, width.value><<<static_cast<unsigned>(rows), kRowThreads, 0, stream>>>(
        static_cast<T*>(x), stride, static_cast<Acc<T>*>(max), static_cast<Acc<T>*>(sum), n);
  });
}

cudaError_t launch_scale_rows(OpElement element, void* x, int64_t stride, const void* factor,
                              int64_t rows, int64_t n, cudaStream_t stream) {
  return with_pack(element, {n, stride}, {x}, [&](auto zero, auto width) {
    using T = decltype(zero);
    scale_rows<T, width.value><<<static_cast<unsigned>(rows), kRowThreads, 0, stream>>>(
        static_cast<T*>(x), stride, static_cast<const Acc<T>*>(factor), n);
  });
}

}  // namespace drrl::cuda
