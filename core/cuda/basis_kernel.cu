#include "core/cuda/basis_kernel.h"

namespace drrl::cuda {
namespace {

constexpr int kThreads = 256;

// The block's scratch: shared memory if as much as it needs was granted, else its part of `global`.
// In doubles.
struct Scratch {
  double* global;
  int64_t each, granted;
  __device__ double* of_block(int64_t size) const {
    extern __shared__ __align__(16) double room[];
    return size <= granted ? room : global + static_cast<int64_t>(blockIdx.x) * each;
  }
};

template <typename T>
__device__ const T* item_of(const Shared<T>& shared, int64_t item, int64_t n, int64_t size) {
  return shared.data + item * shared.count / n * size;
}

__global__ void __launch_bounds__(kThreads)
    update_kernel(Items items, int d, int steps, Shared<float> start, int start_columns,
                  Shared<double> gram_x, Shared<double> gram_y, UpdateSettings settings,
                  float* left, float* right, int columns, int* failed, Scratch scratch) {
  const int64_t item = items.item[blockIdx.x];
  const int rank = static_cast<int>(items.rank[blockIdx.x]);
  const ThreadBlock block;
  const double *x = item_of(gram_x, item, items.n, d * d),
               *y = item_of(gram_y, item, items.n, d * d);
  left += item * d * columns;
  right += item * d * columns;
  const auto report = [=](bool sound) {
    for (int e = static_cast<int>(threadIdx.x); !sound && e < d * rank; e += kThreads) {
      left[e / rank * columns + e % rank] = right[e / rank * columns + e % rank] = nanf("");
    }
    if (threadIdx.x == 0) {
      failed[blockIdx.x] = !sound;
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
  const UpdateItem<ThreadBlock> update(block, d, rank, start_columns, columns, settings,
                                       scratch.of_block(update_scratch_size(d, rank)));
  report(update.run(steps, item_of(start, item, items.n, d * start_columns), x, y, left, right));
}

__global__ void __launch_bounds__(kThreads)
    residual_kernel(Items items, int d, int columns, const float* left, const float* right,
                    int basis_columns, const double* gram, const double* keys, const double* start,
                    float* to, Scratch scratch) {
  const int64_t item = items.item[blockIdx.x];
  const int rank = static_cast<int>(items.rank[blockIdx.x]);
  const ThreadBlock block;
  residual_item(block, d, rank, columns, left + item * d * basis_columns,
                right + item * d * basis_columns, basis_columns, gram + item * d * d,
                1 / (2 * keys[item] * d), start, to + item * d * columns,
                scratch.of_block(residual_scratch_size(d, rank, columns)));
}

// Shared memory for the kernel's blocks, of which the largest needs `scratch.each`: that, or as
// much as the device has for one.
template <typename Kernel>
cudaError_t ask_for_shared(Kernel kernel, Scratch& scratch) {
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = cudaDeviceGetAttribute(
          &most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      error != cudaSuccess) {
    return error;
  }
  constexpr auto kDouble = static_cast<int64_t>(sizeof(double));
  scratch.granted = scratch.each * kDouble <= most ? scratch.each : most / kDouble;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(scratch.granted * kDouble));
}

template <typename Kernel, typename... Arguments>
cudaError_t launch(Kernel kernel, Scratch scratch, cudaStream_t stream, const Items& items,
                   const Arguments&... arguments) {
  if (const cudaError_t error = ask_for_shared(kernel, scratch); error != cudaSuccess) {
    return error;
  }
  kernel<<<static_cast<unsigned>(items.count), kThreads,
           static_cast<size_t>(scratch.granted) * sizeof(double), stream>>>(items, arguments...,
                                                                            scratch);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_update(const Items& items, int d, int steps, Shared<float> start,
                          int start_columns, Shared<double> gram_x, Shared<double> gram_y,
                          const UpdateSettings& settings, float* left, float* right, int columns,
                          int* failed, double* scratch, cudaStream_t stream) {
  return launch(update_kernel, {scratch, update_scratch_size(d, items.largest), 0}, stream, items,
                d, steps, start, start_columns, gram_x, gram_y, settings, left, right, columns,
                failed);
}

cudaError_t launch_residual(const Items& items, int d, int columns, const float* left,
                            const float* right, int basis_columns, const double* gram,
                            const double* keys, const double* start, float* to, double* scratch,
                            cudaStream_t stream) {
  return launch(residual_kernel, {scratch, residual_scratch_size(d, items.largest, columns), 0},
                stream, items, d, columns, left, right, basis_columns, gram, keys, start, to);
}

}  // namespace drrl::cuda
