#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/cuda/basis_item.h"

namespace drrl::cuda {

/// update_basis (core/basis.h) on the device, one thread block an item. start [n, d, rank] float, gram_x and gram_y [n, d, d] double, scratch
/// [n, update_scratch_size] double, all contiguous; writes left and right [n, d, rank], NaN where a Gram is not finite or a factorization failed
/// for every jitter, and failed [n]: 1 there, else 0. d is a multiple of 4, rank of 8. Asynchronous on `stream`; returns the launch's error.
cudaError_t launch_update(int64_t n, int d, int rank, int steps, const float* start, const double* gram_x, const double* gram_y,
                          const UpdateSettings& settings, float* left, float* right, int* failed, double* scratch, cudaStream_t stream);

/// residual_factor likewise. left, right [n, d, rank]; gram [n, d, d]; keys [n]: keys of each item; start [d, columns]; writes to [n, d, columns].
cudaError_t launch_residual(int64_t n, int d, int rank, int columns, const float* left, const float* right, const double* gram, const double* keys,
                            const double* start, float* to, double* scratch, cudaStream_t stream);

}  // namespace drrl::cuda
