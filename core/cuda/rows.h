#pragma once

#include <optional>

#include <ATen/ATen.h>

namespace drrl {

// What core/attention/rows.h and core/attention/exact_attention.cpp move, by one kernel each. Every
// function returns false, or nothing, where memory does not lie as its kernel needs it: on CUDA, x
// [a, b, c, rows, e] a view whose last two dimensions are contiguous, all of its steps multiples of
// 16 bytes. Then the caller goes through ATen.

/// x as a contiguous tensor.
std::optional<at::Tensor> pack_cuda(const at::Tensor& x);

/// x <- packed, contiguous and of the same numbers.
bool unpack_cuda(const at::Tensor& packed, const at::Tensor& x);

/// x += packed, each row times its weight, [a b c rows] float (undefined: one). float, half or
/// bfloat16.
bool add_packed_cuda(const at::Tensor& packed, const at::Tensor& weights, const at::Tensor& x);

/// The shortest vectors whose products with the rows of grad [.., e] are delta [..] (float).
std::optional<at::Tensor> carrier_cuda(const at::Tensor& grad, const at::Tensor& delta);

}  // namespace drrl
