#pragma once

#include <tuple>

#include <ATen/ATen.h>

namespace drrl {

/// Eigenvalues [N, d] (ascending) and eigenvectors [N, d, d] (columns) of symmetric matrices [N, d,
/// d], float32 or float64. CPU: LAPACK, the batch dealt out over threads with one thread a matrix,
/// since two MKL threads inside one small solve can be 100 times slower. CUDA:
/// cusolverDnXsyevBatched on the current stream (core/cuda/eigh.cpp). Errors: Error(kNumerics) with
/// the index of the first matrix that did not converge.
std::tuple<at::Tensor, at::Tensor> batched_eigh(const at::Tensor& matrices);

#ifdef DRRL_WITH_CUDA
std::tuple<at::Tensor, at::Tensor> batched_eigh_cuda(const at::Tensor& matrices);
#endif

}  // namespace drrl
