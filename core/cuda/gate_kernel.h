#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "core/cuda/rows_kernel.h"

namespace drrl::cuda {

/// Of one launch: matrices [n, rows, keys], all contiguous.
struct GateRows {
  int64_t n, rows;
  int keys, chunk;
  float* scores;                   ///< at low rank; those that count afterwards
  const float* full;               ///< exact
  const float *before, *log_gate;  ///< [n, rows], [n]
  float* sums;                     ///< [n, rows], written, as what follows
  bool* exact;
  void *low, *heavy;  ///< weights, of `element`
};

/// gate_row (gate_item.h) on each row. Asynchronous on `stream`; returns the launch's error.
cudaError_t launch_gate(const GateRows& rows, Element element, cudaStream_t stream);

}  // namespace drrl::cuda
