#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace drrl::cuda {

/// Parts of a tensor as pieces of memory: piece (i, j, h) of `length` 16-byte words lies at word i
/// outer + j run + h head of the tensor, and follows the piece before it in the rows. [outer_count,
/// run_count, heads] pieces.
struct Pieces {
  int64_t outer_count, run_count, heads;
  int64_t outer, run, head;
  int64_t length;
};

/// rows <- the pieces of x. Asynchronous on `stream`, as all here; returns the launch's error.
cudaError_t launch_gather(const Pieces& pieces, const void* x, void* rows, cudaStream_t stream);

/// The pieces of x <- rows.
cudaError_t launch_scatter(const Pieces& pieces, const void* rows, void* x, cudaStream_t stream);

enum class Element { kFloat, kHalf, kBFloat16 };

/// The pieces of x += rows times their weight; weights: one float for each `row_length` words of
/// the rows, or null for one. Sums in float.
cudaError_t launch_add(const Pieces& pieces, Element element, const void* rows,
                       const float* weights, int64_t row_length, void* x, cudaStream_t stream);

/// The shortest vectors with the given products: out [n, e] <- grad delta / |grad|^2, zero where
/// grad is; delta [n] float. e: elements of a row.
cudaError_t launch_carrier(int64_t n, int64_t e, Element element, const void* grad,
                           const float* delta, void* out, cudaStream_t stream);

}  // namespace drrl::cuda
