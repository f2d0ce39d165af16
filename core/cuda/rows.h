#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace drrl {

// Pieces of core/rows.h and core/attention_part.cpp by one kernel each. Every one of them returns false, or nothing, where memory does not lie as its kernel
// needs it: float, half or bfloat16 on CUDA, contiguous, rows of a multiple of 16 bytes. Then the caller goes through ATen.

/// token_runs(x, ..) as rows: x [B, H, L, e] -> [B G count, (H / G) rows, e].
std::optional<at::Tensor> gather_runs_cuda(const at::Tensor& x, int64_t groups, int64_t begin, int64_t count, int64_t rows, int64_t stride);

/// The same places of x += added [B G count, (H / G) rows, e], each row times its weight [B G count, (H / G) rows] (float; undefined: one).
bool add_runs_cuda(const at::Tensor& x, int64_t groups, int64_t begin, int64_t count, int64_t rows, int64_t stride, const at::Tensor& added,
                   const at::Tensor& weights);

/// The shortest vectors whose products with the rows of grad [.., e] are delta [..] (float).
std::optional<at::Tensor> carrier_cuda(const at::Tensor& grad, const at::Tensor& delta);

}  // namespace drrl
