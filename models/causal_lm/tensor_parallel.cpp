#include "models/causal_lm/tensor_parallel.h"

#include <utility>

#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include "models/ops/fused_ops.h"
#include "models/ops/gradients.h"

namespace drrl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A Group that an autograd context can keep.
struct GroupHolder : torch::CustomClassHolder {
  explicit GroupHolder(Group held) : group(std::move(held)) {}
  Group group;
};

void keep(AutogradContext* ctx, const Group& group) {
  ctx->saved_data["group"] = c10::IValue::make_capsule(c10::make_intrusive<GroupHolder>(group));
}

Group kept(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<GroupHolder>(ctx->saved_data["group"].toCapsule())
      ->group;
}

struct ColumnParallel : torch::autograd::Function<ColumnParallel> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const Group& tp) {
    const at::Tensor cast = weight.to(x.scalar_type());
    ctx->save_for_backward({x, cast, weight, bias.value_or(at::Tensor())});
    keep(ctx, tp);
    return bias ? at::addmm(bias->to(x.scalar_type()), x, cast.t()) : at::mm(x, cast.t());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor dy = grads[0].contiguous();
    at::Tensor dx;
    if (ctx->needs_input_grad(0)) {
      dx = at::mm(dy, saved[1]);
      kept(ctx).all_reduce(dx);
    }
    add_product_gradient(saved[2], dy.t(), saved[0]);
    if (saved[3].defined()) {
      add_gradient(saved[3], dy.sum(0, /*keepdim=*/false, saved[3].scalar_type()));
    }
    return {dx, {}, {}, {}};
  }
};

constexpr int64_t kNoActivation = -1;

// What a row-parallel layer multiplies, and its adjoint: (activation(x), the gradient of x given
// that of activation(x)).
at::Tensor activate(const at::Tensor& x, std::optional<Activation> activation) {
  if (!activation) {
    return x;
  }
  switch (*activation) {
    case Activation::kSwiglu: return raw::swiglu_forward(x, implementation_for(x));
    case Activation::kGeluTanh: return at::gelu(x, "tanh");
    case Activation::kGelu: return at::gelu(x);
  }
  return x;
}

std::pair<at::Tensor, at::Tensor> activate_backward(const at::Tensor& x, const at::Tensor& dy,
                                                    std::optional<Activation> activation) {
  if (!activation) {
    return {x, dy};
  }
  if (*activation == Activation::kSwiglu) {
    auto gradients = raw::swiglu_backward(x, dy, implementation_for(x));
    return {std::move(gradients.y), std::move(gradients.gate_up)};
  }
  return {activate(x, activation),
          at::gelu_backward(dy, x, *activation == Activation::kGeluTanh ? "tanh" : "none")};
}

struct RowParallel : torch::autograd::Function<RowParallel> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const at::Tensor& residual,
                            const Group& tp, std::optional<Activation> activation) {
    const at::Tensor cast = weight.to(x.scalar_type());
    ctx->save_for_backward({x, cast, weight, bias.value_or(at::Tensor())});
    ctx->saved_data["activation"] = activation ? static_cast<int64_t>(*activation) : kNoActivation;
    at::Tensor y = at::mm(activate(x, activation), cast.t());
    tp.all_reduce(y);
    if (bias) {
      y.add_(*bias);
    }
    return y.add_(residual);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor dy = grads[0].contiguous();
    const int64_t number = ctx->saved_data["activation"].toInt();
    const auto activation = number == kNoActivation
                                ? std::nullopt
                                : std::optional(static_cast<Activation>(number));
    const auto [input, dx] = activate_backward(saved[0], at::mm(dy, saved[1]), activation);
    add_product_gradient(saved[2], dy.t(), input);
    if (saved[3].defined()) {
      add_gradient(saved[3], dy.sum(0, /*keepdim=*/false, saved[3].scalar_type()));
    }
    return {dx, {}, {}, grads[0], {}, {}};
  }
};

struct Embedding : torch::autograd::Function<Embedding> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& weight,
                            const at::Tensor& tokens, int64_t first_row, at::ScalarType dtype,
                            const Group& tp) {
    ctx->save_for_backward({weight, tokens});
    ctx->saved_data["first_row"] = first_row;
    if (tp.size() == 1) {
      return weight.index_select(0, tokens).to(dtype);
    }
    const at::Tensor local = tokens - first_row;
    const at::Tensor foreign = (local < 0).logical_or_(local >= weight.size(0));
    at::Tensor rows = weight.index_select(0, local.masked_fill(foreign, 0))
                          .to(dtype)
                          .masked_fill_(foreign.unsqueeze(1), 0);
    tp.all_reduce(rows);
    return rows;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    if (saved[0].requires_grad()) {
      at::Tensor& grad = saved[0].mutable_grad();
      if (!grad.defined()) {
        grad = at::zeros_like(saved[0]);
      }
      const at::Tensor dy = grads[0].contiguous();
      raw::scatter_add_(grad, saved[1], dy, ctx->saved_data["first_row"].toInt(),
                        implementation_for(dy));
    }
    return {{}, {}, {}, {}, {}};
  }
};

}  // namespace

at::Tensor column_parallel_linear(const at::Tensor& x, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias, const Group& tp) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
              "column_parallel_linear: x ", x.sizes(), " and weight ", weight.sizes(),
              " must be [N, in] and [out, in]");
  return ColumnParallel::apply(x, weight, bias, tp);
}

at::Tensor row_parallel_linear(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& residual,
                               const Group& tp, std::optional<Activation> activation) {
  const bool swiglu = activation == Activation::kSwiglu;
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.is_contiguous() &&
                  x.size(1) == weight.size(1) * (swiglu ? 2 : 1),
              "row_parallel_linear: x ", x.sizes(), " and weight ", weight.sizes(), " must be [N, ",
              swiglu ? "2 in" : "in", "] contiguous and [out, in]");
  TORCH_CHECK(
      residual.dim() == 2 && residual.size(0) == x.size(0) && residual.size(1) == weight.size(0),
      "row_parallel_linear: residual must be [", x.size(0), ", ", weight.size(0), "], not ",
      residual.sizes());
  return RowParallel::apply(x, weight, bias, residual, tp, activation);
}

at::Tensor vocabulary_parallel_embedding(const at::Tensor& tokens, const at::Tensor& weight,
                                         int64_t first_row, at::ScalarType dtype, const Group& tp) {
  TORCH_CHECK(tokens.dim() == 1 && tokens.scalar_type() == at::kLong,
              "embedding: tokens must be [N] int64, not ", tokens.sizes(), " ",
              tokens.scalar_type());
  return Embedding::apply(weight, tokens, first_row, dtype, tp);
}

}  // namespace drrl
