#include "core/cuda/basis_kernel.h"

namespace drrl::cuda {
namespace {

constexpr int kThreads = 256;

// The item's scratch: shared memory if it was asked for, else its part of `global`.
__device__ double* scratch_of(double* global, int64_t size, bool shared) {
  extern __shared__ __align__(16) double room[];
  return shared ? room : global + static_cast<int64_t>(blockIdx.x) * size;
}

__global__ void __launch_bounds__(kThreads) update_kernel(int d, int rank, int steps, const float* start, const double* gram_x, const double* gram_y,
                                                           UpdateSettings settings, float* left, float* right, int* failed, double* global, bool shared) {
  const int64_t item = blockIdx.x;
  const ThreadBlock block;
  const double *x = gram_x + item * d * d, *y = gram_y + item * d * d;
  const int64_t basis = item * d * rank;
  const auto report = [=](bool sound) {
    for (int e = static_cast<int>(threadIdx.x); !sound && e < d * rank; e += kThreads) {
      left[basis + e] = right[basis + e] = nanf("");
    }
    if (threadIdx.x == 0) {
      failed[item] = !sound;
    }
  };
  int bad = 0;
  for (int e = static_cast<int>(threadIdx.x); e < d * d; e += kThreads) {
    bad |= !(isfinite(x[e]) && isfinite(y[e]));
  }
  if (__syncthreads_or(bad)) {
    report(false);
    return;
  }
  const UpdateItem<ThreadBlock> update(block, d, rank, settings, scratch_of(global, update_scratch_size(d, rank), shared));
  report(update.run(steps, start + basis, x, y, left + basis, right + basis));
}

__global__ void __launch_bounds__(kThreads) residual_kernel(int d, int rank, int columns, const float* left, const float* right, const double* gram,
                                                             const double* keys, const double* start, float* to, double* global, bool shared) {
  const int64_t item = blockIdx.x;
  const ThreadBlock block;
  residual_item(block, d, rank, columns, left + item * d * rank, right + item * d * rank, gram + item * d * d, 1 / (2 * keys[item] * d), start,
                to + item * d * columns, scratch_of(global, residual_scratch_size(d, rank, columns), shared));
}

// Lets the kernel have `bytes` of shared memory if the device has so much: {its bytes, whether it fits}.
template <typename Kernel>
cudaError_t ask_for_shared(Kernel kernel, int64_t bytes, bool& fits) {
  int device = 0, most = 0;
  fits = false;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); error != cudaSuccess) {
    return error;
  }
  fits = bytes <= most;
  return fits ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) : cudaSuccess;
}

}  // namespace

cudaError_t launch_update(int64_t n, int d, int rank, int steps, const float* start, const double* gram_x, const double* gram_y,
                          const UpdateSettings& settings, float* left, float* right, int* failed, double* scratch, cudaStream_t stream) {
  const int64_t bytes = update_scratch_size(d, rank) * static_cast<int64_t>(sizeof(double));
  bool shared = false;
  if (const cudaError_t error = ask_for_shared(update_kernel, bytes, shared); error != cudaSuccess) {
    return error;
  }
  update_kernel<<<static_cast<unsigned>(n), kThreads, shared ? bytes : 0, stream>>>(d, rank, steps, start, gram_x, gram_y, settings, left, right, failed,
                                                                                     scratch, shared);
  return cudaGetLastError();
}

cudaError_t launch_residual(int64_t n, int d, int rank, int columns, const float* left, const float* right, const double* gram, const double* keys,
                            const double* start, float* to, double* scratch, cudaStream_t stream) {
  const int64_t bytes = residual_scratch_size(d, rank, columns) * static_cast<int64_t>(sizeof(double));
  bool shared = false;
  if (const cudaError_t error = ask_for_shared(residual_kernel, bytes, shared); error != cudaSuccess) {
    return error;
  }
  residual_kernel<<<static_cast<unsigned>(n), kThreads, shared ? bytes : 0, stream>>>(d, rank, columns, left, right, gram, keys, start, to, scratch, shared);
  return cudaGetLastError();
}

}  // namespace drrl::cuda
