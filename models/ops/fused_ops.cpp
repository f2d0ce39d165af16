#include "models/ops/fused_ops.h"

#include <algorithm>

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.h"
#include "models/ops/cpu_loops.h"
#include "models/ops/cuda/fused_ops.h"
#include "models/ops/gradients.h"

namespace drrl {
namespace {

#ifdef DRRL_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// The element type of cpu_loops for a dtype of ATen, and its pointer.
template <typename T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename Body>
void dispatch(at::ScalarType dtype, Body&& body) {
  switch (dtype) {
    case at::kFloat: body(float{}); break;
    case at::kDouble: body(double{}); break;
    case at::kBFloat16: body(loops::Bf16{}); break;
    default:
      raise(ErrorKind::kInternal, "drrl's operators work on float32, bfloat16 and float64, not on ",
            dtype);
  }
}

at::ScalarType accumulate_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// Rows per task so that a task is worth starting: about 16 k elements.
int64_t grain(int64_t row_elements) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_elements));
}

template <typename T>
loops::Heads<T> heads_of(const at::Tensor& x) {
  return {data<std::remove_const_t<T>>(x), x.size(1), x.stride(0), x.stride(1), x.stride(2)};
}

at::Tensor unit_inner_stride(const at::Tensor& x) {
  return x.stride(3) == 1 ? x : x.contiguous();
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t half = x.size(-1) / 2;
  const at::Tensor wide = x.to(accumulate_dtype(x.scalar_type()));
  const at::Tensor a = wide.narrow(-1, 0, half);
  const at::Tensor b = wide.narrow(-1, half, half);
  return at::cat({a * cos - b * sin, b * cos + a * sin}, -1).to(x.scalar_type());
}

}  // namespace

Implementation implementation_for(const at::Tensor& x) {
  if (kWithCuda && x.is_cuda()) {
    return Implementation::kKernels;
  }
  static const bool supported = loops::supported();
  return x.is_cpu() && supported ? Implementation::kLoops : Implementation::kComposed;
}

namespace raw {

NormResult rms_norm_forward(const at::Tensor& x, const at::Tensor& weight, double eps,
                            Implementation how) {
  if constexpr (kWithCuda) {
    if (how == Implementation::kKernels) {
      return cuda::rms_norm_forward(x, weight, eps);
    }
  }
  const int64_t rows = x.size(0);
  const int64_t n = x.size(1);
  const auto wide_dtype = accumulate_dtype(x.scalar_type());
  if (how != Implementation::kLoops) {
    const at::Tensor wide = x.to(wide_dtype);
    at::Tensor rstd = at::rsqrt(wide.square().mean(1) + eps);
    return {(wide * rstd.unsqueeze(1) * weight).to(x.scalar_type()), rstd};
  }
  NormResult result{at::empty_like(x), at::empty({rows}, x.options().dtype(wide_dtype))};
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = loops::Acc<T>;
    at::parallel_for(0, rows, grain(n), [&](int64_t begin, int64_t end) {
      loops::rms_norm_forward<T>(data<T>(x) + begin * n, data<A>(weight),
                                 data<T>(result.y) + begin * n, data<A>(result.rstd) + begin,
                                 end - begin, n, eps);
    });
  });
  return result;
}

NormGradients rms_norm_backward(const at::Tensor& dy, const at::Tensor& dh, const at::Tensor& x,
                                const at::Tensor& weight, const at::Tensor& rstd,
                                Implementation how) {
  if constexpr (kWithCuda) {
    if (how == Implementation::kKernels && cuda::rms_norm_backward_fits(x)) {
      return cuda::rms_norm_backward(dy, dh, x, weight, rstd);
    }
  }
  const int64_t rows = x.size(0);
  const int64_t n = x.size(1);
  if (how != Implementation::kLoops) {
    const auto wide_dtype = accumulate_dtype(x.scalar_type());
    const at::Tensor wide = x.to(wide_dtype);
    const at::Tensor wide_dy = dy.to(wide_dtype);
    const at::Tensor r = rstd.unsqueeze(1);
    const at::Tensor g = wide_dy * weight;
    at::Tensor dx = g * r - wide * r.pow(3) * (g * wide).mean(1, /*keepdim=*/true);
    if (dh.defined()) {
      dx = dx + dh;
    }
    return {dx.to(x.scalar_type()), (wide_dy * wide * r).sum(0)};
  }
  // The sum over rows goes by fixed stripes of rows, so that it does not depend on how threads
  // share them.
  constexpr int64_t kMostStripes = 32;
  const int64_t stripe = std::max(grain(n), (rows + kMostStripes - 1) / kMostStripes);
  const int64_t stripes = (rows + stripe - 1) / stripe;
  at::Tensor dx = at::empty_like(x);
  at::Tensor partial = at::zeros({stripes, n}, weight.options().requires_grad(false));
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = loops::Acc<T>;
    at::parallel_for(0, stripes, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * stripe;
        loops::rms_norm_backward<T>(
            data<T>(dy) + first * n, dh.defined() ? data<T>(dh) + first * n : nullptr,
            data<T>(x) + first * n, data<A>(weight), data<A>(rstd) + first, data<T>(dx) + first * n,
            data<A>(partial) + i * n, std::min(stripe, rows - first), n);
      }
    });
  });
  return {dx, partial.sum(0)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rope_split_forward(
    const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, int64_t batch,
    int64_t heads, int64_t groups, Implementation how) {
  if constexpr (kWithCuda) {
    if (how == Implementation::kKernels) {
      return cuda::rope_split_forward(qkv, cos, sin, batch, heads, groups);
    }
  }
  const int64_t length = qkv.size(0) / batch;
  const int64_t d = qkv.size(1) / (heads + 2 * groups);
  if (how != Implementation::kLoops) {
    const at::Tensor all = qkv.view({batch, length, heads + 2 * groups, d}).transpose(1, 2);
    return {rotate(all.narrow(1, 0, heads), cos, sin),
            rotate(all.narrow(1, heads, groups), cos, sin),
            all.narrow(1, heads + groups, groups).contiguous()};
  }
  at::Tensor q = at::empty({batch, heads, length, d}, qkv.options());
  at::Tensor k = at::empty({batch, groups, length, d}, qkv.options());
  at::Tensor v = at::empty({batch, groups, length, d}, qkv.options());
  dispatch(qkv.scalar_type(), [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, batch * length, grain(qkv.size(1)), [&](int64_t begin, int64_t end) {
      loops::rope_split_forward<T>(data<T>(qkv), data<float>(cos), data<float>(sin), heads_of<T>(q),
                                   heads_of<T>(k), heads_of<T>(v), length, d, begin, end);
    });
  });
  return {q, k, v};
}

at::Tensor rope_split_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                               const at::Tensor& cos, const at::Tensor& sin, Implementation how) {
  if constexpr (kWithCuda) {
    if (how == Implementation::kKernels) {
      return cuda::rope_split_backward(unit_inner_stride(dq), unit_inner_stride(dk),
                                       unit_inner_stride(dv), cos, sin);
    }
  }
  const int64_t batch = dq.size(0);
  const int64_t length = dq.size(2);
  const int64_t d = dq.size(3);
  const int64_t width = (dq.size(1) + dk.size(1) + dv.size(1)) * d;
  if (how != Implementation::kLoops) {
    const at::Tensor back = -sin;
    return at::cat({rotate(dq, cos, back), rotate(dk, cos, back), dv}, 1)
        .transpose(1, 2)
        .reshape({batch * length, width});
  }
  at::Tensor d_qkv = at::empty({batch * length, width}, dq.options());
  const at::Tensor q = unit_inner_stride(dq);
  const at::Tensor k = unit_inner_stride(dk);
  const at::Tensor v = unit_inner_stride(dv);
  dispatch(dq.scalar_type(), [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, batch * length, grain(width), [&](int64_t begin, int64_t end) {
      loops::rope_split_backward<T>(data<T>(d_qkv), data<float>(cos), data<float>(sin),
                                    heads_of<const T>(q), heads_of<const T>(k),
                                    heads_of<const T>(v), length, d, begin, end);
    });
  });
  return d_qkv;
}

at::Tensor swiglu_forward(const at::Tensor& gate_up, Implementation how) {
  if constexpr (kWithCuda) {
    if (how == Implementation::kKernels) {
      return cuda::swiglu_forward(gate_up);
    }
  }
  const int64_t rows = gate_up.size(0);
  const int64_t n = gate_up.size(1) / 2;
  if (how != Implementation::kLoops) {
    const at::Tensor wide = gate_up.to(accumulate_dtype(gate_up.scalar_type()));
    return (at::silu(wide.narrow(1, 0, n)) * wide.narrow(1, n, n)).to(gate_up.scalar_type());
  }
  at::Tensor y = at::empty({rows, n}, gate_up.options());
  dispatch(gate_up.scalar_type(), [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, rows, grain(2 * n), [&](int64_t begin, int64_t end) {
      loops::swiglu_forward<T>(data<T>(gate_up) + begin * 2 * n, data<T>(y) + begin * n,
                               end - begin, n);
    });
  });
  return y;
}

SwigluGradients swiglu_backward(const at::Tensor& gate_up, const at::Tensor& dy,
                                Implementation how) {
  if constexpr (kWithCuda) {
    if (how == Implementation::kKernels) {
      return cuda::swiglu_backward(gate_up, dy);
    }
  }
  const int64_t rows = gate_up.size(0);
  const int64_t n = gate_up.size(1) / 2;
  if (how != Implementation::kLoops) {
    const at::Tensor wide = gate_up.to(accumulate_dtype(gate_up.scalar_type()));
    const at::Tensor up = wide.narrow(1, n, n);
    const at::Tensor sigmoid = at::sigmoid(wide.narrow(1, 0, n));
    const at::Tensor silu = wide.narrow(1, 0, n) * sigmoid;
    const at::Tensor d_gate = dy * up * (sigmoid + silu * (1.0 - sigmoid));
    return {at::cat({d_gate, dy * silu}, 1).to(gate_up.scalar_type()),
            (silu * up).to(gate_up.scalar_type())};
  }
  SwigluGradients result{at::empty_like(gate_up), at::empty({rows, n}, gate_up.options())};
  dispatch(gate_up.scalar_type(), [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, rows, grain(2 * n), [&](int64_t begin, int64_t end) {
      loops::swiglu_backward<T>(data<T>(gate_up) + begin * 2 * n, data<T>(dy) + begin * n,
                                data<T>(result.gate_up) + begin * 2 * n,
                                data<T>(result.y) + begin * n, end - begin, n);
    });
  });
  return result;
}

std::pair<at::Tensor, at::Tensor> exp_rows_(at::Tensor& logits, Implementation how) {
  if constexpr (kWithCuda) {
    if (how == Implementation::kKernels) {
      return cuda::exp_rows_(logits);
    }
  }
  const int64_t rows = logits.size(0);
  const int64_t n = logits.size(1);
  const auto wide_dtype = accumulate_dtype(logits.scalar_type());
  if (how != Implementation::kLoops) {
    const at::Tensor wide = logits.to(wide_dtype);
    at::Tensor max = wide.amax(1);
    const at::Tensor exponentials = at::exp(wide - max.unsqueeze(1));
    logits.copy_(exponentials);
    return {max, exponentials.sum(1)};
  }
  at::Tensor max = at::empty({rows}, logits.options().dtype(wide_dtype));
  at::Tensor sum = at::empty_like(max);
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = loops::Acc<T>;
    at::parallel_for(0, rows, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        loops::exp_row<T>(data<T>(logits) + row * logits.stride(0), n, data<A>(max) + row,
                          data<A>(sum) + row);
      }
    });
  });
  return {max, sum};
}

void scale_rows_(at::Tensor& logits, const at::Tensor& factor, Implementation how) {
  if constexpr (kWithCuda) {
    if (how == Implementation::kKernels) {
      return cuda::scale_rows_(logits, factor);
    }
  }
  if (how != Implementation::kLoops) {
    logits.mul_(factor.unsqueeze(1));
    return;
  }
  const int64_t n = logits.size(1);
  dispatch(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = loops::Acc<T>;
    at::parallel_for(0, logits.size(0), grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        loops::scale_row<T>(data<T>(logits) + row * logits.stride(0), n, data<A>(factor)[row]);
      }
    });
  });
}

void scatter_add_(at::Tensor& table, const at::Tensor& ids, const at::Tensor& x, int64_t first,
                  Implementation how) {
  const int64_t rows = table.size(0);
  const int64_t n = table.size(1);
  if (how != Implementation::kLoops) {
    // index_put_ sorts the indices: deterministic, unlike index_add_ on CUDA.
    const at::Tensor local = ids - first;
    const at::Tensor mine = at::nonzero((local >= 0).logical_and_(local < rows)).squeeze(1);
    table.index_put_({local.index_select(0, mine)}, x.index_select(0, mine).to(table.scalar_type()),
                     /*accumulate=*/true);
    return;
  }
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = loops::Acc<T>;
    // Threads share out columns, not tokens: a token may occur more than once.
    at::parallel_for(0, n, std::max<int64_t>(16, grain(ids.numel())),
                     [&](int64_t begin, int64_t end) {
                       loops::scatter_add<T>(data<T>(x), data<int64_t>(ids), ids.numel(),
                                             data<A>(table), first, rows, n, begin, end);
                     });
  });
}

}  // namespace raw

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& h, const at::Tensor& weight,
                               double eps) {
    const auto result = raw::rms_norm_forward(h, weight, eps, implementation_for(h));
    ctx->save_for_backward({h, weight, result.rstd});
    ctx->set_materialize_grads(false);
    return {h, result.y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& weight = saved[1];
    if (!grads[1].defined()) {
      return {grads[0], {}, {}};
    }
    const at::Tensor dh = grads[0].defined() ? grads[0].contiguous() : at::Tensor();
    auto gradients = raw::rms_norm_backward(grads[1].contiguous(), dh, saved[0], weight, saved[2],
                                            implementation_for(saved[0]));
    add_gradient(weight, std::move(gradients.weight));
    return {gradients.x, {}, {}};
  }
};

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& h, const at::Tensor& weight,
                               const at::Tensor& bias, double eps) {
    auto [y, mean, rstd] = at::native_layer_norm(h.to(weight.scalar_type()), {h.size(1)}, weight,
                                                 bias, eps);
    ctx->save_for_backward({h, weight, bias, mean, rstd});
    ctx->set_materialize_grads(false);
    return {h, y.to(h.scalar_type())};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &h = saved[0], &weight = saved[1], &bias = saved[2];
    if (!grads[1].defined()) {
      return {grads[0], {}, {}, {}};
    }
    const auto wide = weight.scalar_type();
    auto [dx, d_weight, d_bias] = at::native_layer_norm_backward(
        grads[1].contiguous().to(wide), h.to(wide), {h.size(1)}, saved[3], saved[4], weight, bias,
        {true, weight.requires_grad(), bias.requires_grad()});
    add_gradient(weight, std::move(d_weight));
    add_gradient(bias, std::move(d_bias));
    if (grads[0].defined()) {
      dx = dx + grads[0];
    }
    return {dx.to(h.scalar_type()), {}, {}, {}};
  }
};

struct AddPositions : torch::autograd::Function<AddPositions> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h, const at::Tensor& weight,
                            const at::Tensor& positions, int64_t batch) {
    ctx->save_for_backward({weight, positions});
    ctx->saved_data["batch"] = batch;
    return h.view({batch, positions.size(0), h.size(1)})
        .add(weight.index_select(0, positions))
        .to(h.scalar_type())
        .view(h.sizes());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& weight = saved[0];
    if (weight.requires_grad()) {
      const int64_t batch = ctx->saved_data["batch"].toInt();
      const at::Tensor dy = grads[0]
                                .reshape({batch, -1, weight.size(1)})
                                .sum(0, /*keepdim=*/false, weight.scalar_type());
      at::Tensor& grad = weight.mutable_grad();
      if (!grad.defined()) {
        grad = at::zeros_like(weight);
      }
      grad.index_add_(0, saved[1], dy);
    }
    return {grads[0], {}, {}, {}};
  }
};

struct RopeSplit : torch::autograd::Function<RopeSplit> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& qkv, const at::Tensor& cos,
                               const at::Tensor& sin, int64_t batch, int64_t heads,
                               int64_t groups) {
    auto [q, k, v] = raw::rope_split_forward(qkv, cos, sin, batch, heads, groups,
                                             implementation_for(qkv));
    ctx->save_for_backward({cos, sin});
    return {q, k, v};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {raw::rope_split_backward(grads[0], grads[1], grads[2], saved[0], saved[1],
                                     implementation_for(grads[0])),
            {},
            {},
            {},
            {},
            {}};
  }
};

}  // namespace

std::pair<at::Tensor, at::Tensor> rms_norm(const at::Tensor& h, const at::Tensor& weight,
                                           double eps) {
  TORCH_CHECK(h.dim() == 2 && h.is_contiguous(), "rms_norm: h must be a contiguous [N, n], not ",
              h.sizes());
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == h.size(1) &&
                  weight.scalar_type() == accumulate_dtype(h.scalar_type()),
              "rms_norm: weight must be [", h.size(1), "] in fp32 (fp64 with fp64), not ",
              weight.sizes(), " in ", weight.scalar_type());
  const auto out = RmsNorm::apply(h, weight, eps);
  return {out[0], out[1]};
}

std::pair<at::Tensor, at::Tensor> layer_norm(const at::Tensor& h, const at::Tensor& weight,
                                             const at::Tensor& bias, double eps) {
  const auto wide = accumulate_dtype(h.scalar_type());
  TORCH_CHECK(h.dim() == 2 && h.is_contiguous(), "layer_norm: h must be a contiguous [N, n], not ",
              h.sizes());
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == h.size(1) && weight.sizes() == bias.sizes() &&
                  weight.scalar_type() == wide && bias.scalar_type() == wide,
              "layer_norm: weight and bias must be [", h.size(1),
              "] in fp32 (fp64 with fp64), not ", weight.sizes(), " in ", weight.scalar_type(),
              " and ", bias.sizes(), " in ", bias.scalar_type());
  const auto out = LayerNorm::apply(h, weight, bias, eps);
  return {out[0], out[1]};
}

at::Tensor add_positions(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& positions,
                         int64_t batch) {
  TORCH_CHECK(h.dim() == 2 && weight.dim() == 2 && h.size(1) == weight.size(1) &&
                  positions.dim() == 1 && h.size(0) == batch * positions.size(0),
              "add_positions: h ", h.sizes(), " of ", batch, " sequences, weight ", weight.sizes(),
              ", positions ", positions.sizes(), ", expected [B L, n], rows of n and [L]");
  return AddPositions::apply(h, weight, positions, batch);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rope_split(const at::Tensor& qkv,
                                                          const at::Tensor& cos,
                                                          const at::Tensor& sin, int64_t batch,
                                                          int64_t heads, int64_t groups) {
  TORCH_CHECK(qkv.dim() == 2 && qkv.is_contiguous() && qkv.size(0) % batch == 0 &&
                  qkv.size(1) % (2 * (heads + 2 * groups)) == 0,
              "rope_split: qkv must be a contiguous [", batch, " L, (", heads, " + 2 * ", groups,
              ") d] with even d, not ", qkv.sizes());
  const std::vector<int64_t> table = {qkv.size(0) / batch, qkv.size(1) / (heads + 2 * groups) / 2};
  TORCH_CHECK(cos.sizes().equals(table) && sin.sizes().equals(table) && cos.is_contiguous() &&
                  sin.is_contiguous() && cos.scalar_type() == at::kFloat &&
                  sin.scalar_type() == at::kFloat,
              "rope_split: cos and sin must be contiguous fp32 ", table, ", not ", cos.sizes(),
              " and ", sin.sizes());
  const auto out = RopeSplit::apply(qkv, cos, sin, batch, heads, groups);
  return {out[0], out[1], out[2]};
}

}  // namespace drrl
