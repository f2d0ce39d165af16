#include "models/ops/gradients.h"

#include <ATen/core/grad_mode.h>

#include "core/error.h"

namespace drrl {
namespace {

bool wants_gradient(const at::Tensor& parameter) {
  check(ErrorKind::kInternal, parameter.is_leaf(), "the weight of a drrl operator, of shape ",
        parameter.sizes(), ", is not a leaf");
  return parameter.requires_grad();
}

}  // namespace

void add_gradient(const at::Tensor& parameter, at::Tensor gradient, double scale) {
  if (!wants_gradient(parameter)) {
    return;
  }
  at::NoGradGuard no_grad;
  at::Tensor& grad = parameter.mutable_grad();
  if (grad.defined()) {
    grad.add_(gradient, scale);
  } else {
    gradient = gradient.to(parameter.scalar_type());
    grad = scale == 1.0 ? gradient : gradient.mul_(scale);
  }
}

void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  if (a.is_cuda() && a.scalar_type() == at::kBFloat16 &&
      dtype == at::kFloat) {  // added up in float from the first product on
    if (sum.defined()) {
      at::addmm_out(sum, sum, a, b, dtype);
    } else {
      sum = at::mm(a, b, dtype);
    }
  } else if (!sum.defined()) {
    sum = at::mm(a, b).to(dtype);
  } else if (a.scalar_type() == dtype) {
    sum.addmm_(a, b);
  } else {
    sum.add_(at::mm(a, b));
  }
}

void add_product_gradient(const at::Tensor& parameter, const at::Tensor& a, const at::Tensor& b) {
  if (wants_gradient(parameter)) {
    at::NoGradGuard no_grad;
    add_product(parameter.mutable_grad(), a, b, parameter.scalar_type());
  }
}

}  // namespace drrl
