#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "core/cuda/basis_item.h"

namespace drrl::cuda {

/// What the thread blocks of a launch work on: of n items these, `count` of them, each at its rank,
/// at most `largest`. item and rank: on the device.
struct Items {
  int64_t n, count;
  const int64_t *item, *rank;
  int largest;
};

/// `count` matrices for n items, neighbours that share one; contiguous, on the device.
template <typename T>
struct Shared {
  const T* data;
  int64_t count;
};

/// update_bases (core/linalg/basis.h) on the device, one thread block an item. start [.., d,
/// start_columns], gram_x and gram_y [.., d, d], scratch [count, update_scratch_size of the largest
/// rank]; writes left and right [n, d, columns], of each item its rank's columns, NaN where a Gram
/// is not finite or a factorization failed for every jitter, and failed [count]: 1 there, else 0. d
/// is a multiple of 4, ranks of 8. Asynchronous on `stream`; returns the launch's error.
cudaError_t launch_update(const Items& items, int d, int steps, Shared<float> start,
                          int start_columns, Shared<double> gram_x, Shared<double> gram_y,
                          const UpdateSettings& settings, float* left, float* right, int columns,
                          int* failed, double* scratch, cudaStream_t stream);

/// residual_factor likewise. left, right [n, d, basis_columns]; gram [n, d, d]; keys [n]: keys of
/// each item; start [d, columns]; writes to [n, d, columns].
cudaError_t launch_residual(const Items& items, int d, int columns, const float* left,
                            const float* right, int basis_columns, const double* gram,
                            const double* keys, const double* start, float* to, double* scratch,
                            cudaStream_t stream);

}  // namespace drrl::cuda
