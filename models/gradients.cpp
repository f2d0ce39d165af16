#include "models/gradients.h"

#include "core/error.h"

namespace drrl {
namespace {

bool wants_gradient(const at::Tensor& parameter) {
  check(ErrorKind::kInternal, parameter.is_leaf(), "the weight of a drrl operator, of shape ", parameter.sizes(),
        ", is not a leaf");
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

void add_product_gradient(const at::Tensor& parameter, const at::Tensor& a, const at::Tensor& b) {
  if (!wants_gradient(parameter)) {
    return;
  }
  at::NoGradGuard no_grad;
  at::Tensor& grad = parameter.mutable_grad();
  if (!grad.defined()) {
    grad = at::mm(a, b).to(parameter.scalar_type());
  } else if (a.scalar_type() == grad.scalar_type()) {
    grad.addmm_(a, b);
  } else {
    grad.add_(at::mm(a, b));
  }
}

}  // namespace drrl
