#include "core/cuda/numbers.h"
#include "core/cuda/rows_kernel.h"

namespace drrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsPerThread = 4;

dim3 grid_of(const Pieces& p) {
  const int64_t words = kThreads * kWordsPerThread, count = p.outer_count * p.run_count * p.heads,
                most = 65535;
  return dim3(static_cast<unsigned>((p.length + words - 1) / words),
              static_cast<unsigned>(count < most ? count : most));
}

// f(word of x, word of the rows, row before this piece, word of this piece) for every word of every
// piece; a row has row_length words.
template <typename F>
__device__ void for_each_word(const Pieces& p, int64_t row_length, F f) {
  const int64_t count = p.outer_count * p.run_count * p.heads;
  for (int64_t piece = blockIdx.y; piece < count; piece += gridDim.y) {
    const int64_t h = piece % p.heads, j = piece / p.heads % p.run_count,
                  i = piece / p.heads / p.run_count;
    const int64_t begin = i * p.outer + j * p.run + h * p.head,
                  rows_before = piece * (p.length / row_length);
#pragma unroll
    for (int turn = 0; turn < kWordsPerThread; ++turn) {
      const int64_t word = (static_cast<int64_t>(blockIdx.x) * kWordsPerThread + turn) * kThreads +
                           threadIdx.x;
      if (word < p.length) {
        f(begin + word, piece * p.length + word, rows_before, static_cast<uint32_t>(word));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(Pieces p, const uint4* __restrict__ x, uint4* __restrict__ rows) {
  for_each_word(p, p.length, [=](int64_t at, int64_t to, int64_t, uint32_t) { rows[to] = x[at]; });
}

__global__ void __launch_bounds__(kThreads)
    scatter_kernel(Pieces p, const uint4* __restrict__ rows, uint4* __restrict__ x) {
  for_each_word(p, p.length,
                [=](int64_t at, int64_t from, int64_t, uint32_t) { x[at] = rows[from]; });
}

// The numbers of one word.
template <typename T>
struct Word {
  static constexpr int kCount = 16 / sizeof(T);
  T numbers[kCount];
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_kernel(Pieces p, const uint4* __restrict__ rows, const float* __restrict__ weights,
               int64_t row_length, uint4* __restrict__ x) {
  for_each_word(p, row_length, [=](int64_t at, int64_t source, int64_t rows_before, uint32_t word) {
    const uint4 from = rows[source], into = x[at];
    const auto& a = reinterpret_cast<const Word<T>&>(from);
    auto sum = reinterpret_cast<const Word<T>&>(into);
    const float weight = weights == nullptr
                             ? 1.0f
                             : weights[rows_before + word / static_cast<uint32_t>(row_length)];
    for (int i = 0; i < Word<T>::kCount; ++i) {
      sum.numbers[i] = narrow<T>(widen(sum.numbers[i]) + weight * widen(a.numbers[i]));
    }
    x[at] = reinterpret_cast<const uint4&>(sum);
  });
}

// One warp a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    carrier_kernel(int64_t n, int64_t e, const T* __restrict__ grad,
                   const float* __restrict__ delta, T* __restrict__ out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (row >= n) {
    return;  // a whole warp
  }
  const T* from = grad + row * e;
  float square = 0;
  for (int64_t i = lane; i < e; i += 32) {
    const float x = widen(from[i]);
    square += x * x;
  }
  for (int step = 16; step > 0; step /= 2) {
    square += __shfl_xor_sync(0xffffffffu, square, step);
  }
  const float factor = square > 0 ? delta[row] / square : 0;
  for (int64_t i = lane; i < e; i += 32) {
    out[row * e + i] = narrow<T>(factor * widen(from[i]));
  }
}

template <typename F>
cudaError_t with_type(Element element, F f) {
  switch (element) {
    case Element::kFloat: f(float()); break;
    case Element::kHalf: f(__half()); break;
    case Element::kBFloat16: f(__nv_bfloat16()); break;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gather(const Pieces& pieces, const void* x, void* rows, cudaStream_t stream) {
  gather_kernel<<<grid_of(pieces), kThreads, 0, stream>>>(pieces, static_cast<const uint4*>(x),
                                                          static_cast<uint4*>(rows));
  return cudaGetLastError();
}

cudaError_t launch_scatter(const Pieces& pieces, const void* rows, void* x, cudaStream_t stream) {
  scatter_kernel<<<grid_of(pieces), kThreads, 0, stream>>>(pieces, static_cast<const uint4*>(rows),
                                                           static_cast<uint4*>(x));
  return cudaGetLastError();
}

cudaError_t launch_add(const Pieces& pieces, Element element, const void* rows,
                       const float* weights, int64_t row_length, void* x, cudaStream_t stream) {
  return with_type(element, [&](auto type) {
    add_kernel<decltype(type)><<<grid_of(pieces), kThreads, 0, stream>>>(
        pieces, static_cast<const uint4*>(rows), weights, row_length, static_cast<uint4*>(x));
  });
}

cudaError_t launch_carrier(int64_t n, int64_t e, Element element, const void* grad,
                           const float* delta, void* out, cudaStream_t stream) {
  return with_type(element, [&](auto type) {
    using T = decltype(type);
    carrier_kernel<T>
        <<<static_cast<unsigned>((n * 32 + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
            n, e, static_cast<const T*>(grad), delta, static_cast<T*>(out));
  });
}

}  // namespace drrl::cuda
