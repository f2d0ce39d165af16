#pragma once

#include <ATen/ATen.h>

namespace drrl {

/// How drrl's autograd functions hand over the gradients of parameters: added to `parameter.grad()`
/// in place, instead of being returned to the engine. A weight's gradient is one matrix product
/// with beta = 1, so accumulating over micro-batches and over tied uses costs no extra pass over
/// memory and no extra buffer. The price: hooks on parameters do not see these gradients.
///
/// A parameter is a leaf; one that does not require grad is left alone. An undefined gradient
/// counts as zero.

/// parameter.grad += scale * gradient. May take `gradient` over as the new .grad: do not use it
/// afterwards.
void add_gradient(const at::Tensor& parameter, at::Tensor gradient, double scale = 1.0);

/// sum += a b, or sum <- a b if it is undefined, in `dtype`, for matrices a [m, k] and b [k, n] of
/// the same or a lower precision.
void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype);

/// parameter.grad += a b for matrices a [m, k], b [k, n] and a parameter [m, n]; a and b may be of
/// a lower precision.
void add_product_gradient(const at::Tensor& parameter, const at::Tensor& a, const at::Tensor& b);

}  // namespace drrl
