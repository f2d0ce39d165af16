#pragma once

#include <ATen/ATen.h>

namespace drrl {

/// Gates a slice's matrices [n, rows, keys] by one kernel: scores float32 at low rank, overwritten;
/// full: exact; before [n, rows]; log_gate [n, 1]; chunk: keys that are looked at together. Makes
/// sums [n, rows], the weights `low` and `heavy` of `dtype`, and `exact` (GatedWeights in
/// lowrank_attention.cpp). False, and nothing done, where it has no kernel: off CUDA, and for
/// float64.
bool gate_cuda(const at::Tensor& scores, const at::Tensor& full, const at::Tensor& before,
               const at::Tensor& log_gate, int64_t chunk, at::ScalarType dtype, at::Tensor& sums,
               at::Tensor& low, at::Tensor& heavy, at::Tensor& exact);

}  // namespace drrl
