#include "models/training/optimizer.h"

#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "models/causal_lm/causal_lm.h"

namespace drrl {

void AdamW::Options::validate() const {
  check(ErrorKind::kUsage, beta1 >= 0 && beta1 < 1, "beta1 must lie in [0, 1), got ", beta1);
  check(ErrorKind::kUsage, beta2 >= 0 && beta2 < 1, "beta2 must lie in [0, 1), got ", beta2);
  check(ErrorKind::kUsage, eps >= 0, "eps must not be negative, got ", eps);
  check(ErrorKind::kUsage, weight_decay >= 0, "weight_decay must not be negative, got ",
        weight_decay);
}

AdamW::AdamW(std::vector<Parameter>& parameters, const Options& options)
    : parameters_(parameters), options_(options) {
  options_.validate();
  check(ErrorKind::kInternal, !parameters.empty(), "an optimizer needs at least one parameter");
  step_ = at::zeros({}, parameters.front().value.options().dtype(at::kFloat).requires_grad(false));
  decayed_.weight_decay = options_.weight_decay;
  for (const Parameter& parameter : parameters_) {
    check(ErrorKind::kInternal, parameter.value.scalar_type() == at::kFloat, "parameter ",
          parameter.name, " must be an fp32 master, got ", parameter.value.scalar_type());
    Group& group = parameter.decay ? decayed_ : plain_;
    group.values.push_back(parameter.value);
    group.exp_avgs.push_back(
        at::zeros_like(parameter.value.detach(), at::MemoryFormat::Contiguous));
    group.exp_avg_sqs.push_back(
        at::zeros_like(parameter.value.detach(), at::MemoryFormat::Contiguous));
    group.steps.push_back(step_);
  }
}

void AdamW::step(double lr, double gradient_scale) {
  const at::NoGradGuard no_grad;
  step_ += 1;
  // The kernel divides by grad_scale.
  std::optional<at::Tensor> divisor;
  if (gradient_scale != 1.0) {
    divisor = at::full({}, 1.0 / gradient_scale, step_.options());
  }
  for (Group* group : {&decayed_, &plain_}) {
    if (group->values.empty()) {
      continue;
    }
    std::vector<at::Tensor> gradients;
    gradients.reserve(group->values.size());
    for (const at::Tensor& value : group->values) {
      check(ErrorKind::kInternal, value.grad().defined() && value.grad().is_contiguous(),
            "a parameter of shape ", value.sizes(),
            " has no gradient, or one that the fused kernel cannot walk");
      gradients.push_back(value.grad());
    }
    at::_fused_adamw_(group->values, gradients, group->exp_avgs, group->exp_avg_sqs, {},
                      group->steps, lr, options_.beta1, options_.beta2, group->weight_decay,
                      options_.eps, /*amsgrad=*/false, /*maximize=*/false, divisor);
  }
}

int64_t AdamW::steps_taken() const {
  return static_cast<int64_t>(step_.item<float>());
}

std::map<std::string, at::Tensor> AdamW::state() const {
  std::map<std::string, at::Tensor> tensors{{"step", step_}};
  size_t decayed = 0;
  size_t plain = 0;
  for (const Parameter& parameter : parameters_) {
    const Group& group = parameter.decay ? decayed_ : plain_;
    const size_t i = parameter.decay ? decayed++ : plain++;
    tensors["exp_avg." + parameter.name] = group.exp_avgs[i];
    tensors["exp_avg_sq." + parameter.name] = group.exp_avg_sqs[i];
  }
  return tensors;
}

}  // namespace drrl
