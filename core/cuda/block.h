#pragma once

#include <cmath>

/// Code that a thread block runs together, written so that the host can run it too: a test without
/// a GPU executes the very same lines, one element after another.
#ifdef __CUDACC__
#define DRRL_HOST_DEVICE __host__ __device__ __forceinline__
#define DRRL_UNROLL _Pragma("unroll")
#define DRRL_UNROLL_4 _Pragma("unroll 4")
#else
#define DRRL_HOST_DEVICE inline
#define DRRL_UNROLL
#define DRRL_UNROLL_4
#endif

namespace drrl::cuda {

/// A block of one thread, on the host.
struct HostBlock {
  /// f(0), .., f(n - 1), which write to different places and do not read what another of them
  /// writes. All are done when it returns.
  template <typename F>
  DRRL_HOST_DEVICE void each(int n, F f) const {
    for (int i = 0; i < n; ++i) {
      f(i);
    }
  }
  /// store(i, sum of term(i, 0), .., term(i, length - 1)) for i < n, likewise.
  template <typename Term, typename Store>
  DRRL_HOST_DEVICE void sums(int n, int length, Term term, Store store) const {
    for (int i = 0; i < n; ++i) {
      double sum = 0;
      for (int j = 0; j < length; ++j) {
        sum += term(i, j);
      }
      store(i, sum);
    }
  }
  DRRL_HOST_DEVICE void sync() const {}
};

/// A warp of one thread, on the host.
struct HostWarp : HostBlock {
  /// Of f(0), .., f(n - 1), n >= 1, to all threads.
  template <typename F>
  DRRL_HOST_DEVICE auto max(int n, F f) const {
    auto most = f(0);
    for (int i = 1; i < n; ++i) {
      const auto x = f(i);
      most = x > most ? x : most;
    }
    return most;
  }
  template <typename F>
  DRRL_HOST_DEVICE auto sum(int n, F f) const {
    auto all = f(0);
    for (int i = 1; i < n; ++i) {
      all += f(i);
    }
    return all;
  }
};

#ifdef __CUDACC__
/// The warp of the calling thread, in a block of one dimension, all of its threads present. What
/// one thread wrote others may not read.
struct ThreadWarp {
  template <typename F>
  __device__ __forceinline__ void each(int n, F f) const {
    for (int i = static_cast<int>(threadIdx.x) % 32; i < n; i += 32) {
      f(i);
    }
  }
  template <typename F>
  __device__ __forceinline__ float max(int n, F f) const {
    float most = -INFINITY;
    each(n, [&](int i) { most = fmaxf(most, f(i)); });
    for (int step = 16; step > 0; step /= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    }
    return most;
  }
  template <typename F>
  __device__ __forceinline__ float sum(int n, F f) const {
    float all = 0;
    each(n, [&](int i) { all += f(i); });
    for (int step = 16; step > 0; step /= 2) {
      all += __shfl_xor_sync(0xffffffffu, all, step);
    }
    return all;
  }
};

/// The block of the calling thread: one dimension, whole warps. All threads must call the same
/// functions in the same order.
struct ThreadBlock {
  template <typename F>
  __device__ __forceinline__ void each(int n, F f) const {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
      f(i);
    }
    __syncthreads();
  }
  template <typename Term, typename Store>
  __device__ __forceinline__ void sums(int n, int length, Term term, Store store) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int i = static_cast<int>(threadIdx.x) / 32; i < n;
         i += static_cast<int>(blockDim.x) / 32) {
      double sum = 0;
      for (int j = lane; j < length; j += 32) {
        sum += term(i, j);
      }
      for (int step = 16; step > 0; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
      }
      if (lane == 0) {
        store(i, sum);
      }
    }
    __syncthreads();
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};
#endif

}  // namespace drrl::cuda
