#include "models/ops/cuda/fused_ops.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "core/cuda/check.h"
#include "models/ops/cuda/fused_ops_kernel.h"

namespace drrl::cuda {
namespace {

OpElement element_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return OpElement::kFloat;
    case at::kDouble: return OpElement::kDouble;
    case at::kBFloat16: return OpElement::kBFloat16;
    default:
      raise(ErrorKind::kInternal, "drrl's operators work on float32, bfloat16 and float64, not on ",
            x.scalar_type());
  }
}

at::TensorOptions wide_options(const at::Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// launch(stream), on the device of x.
template <typename Launch>
void run(const at::Tensor& x, Launch&& launch) {
  if (x.numel() > 0) {
    const c10::cuda::CUDAGuard on_device(x.device());
    DRRL_CHECK_CUDA(launch(c10::cuda::getCurrentCUDAStream().stream()));
  }
}

OpHeads heads_of(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.size(1), x.stride(0), x.stride(1), x.stride(2)};
}

}  // namespace

raw::NormResult rms_norm_forward(const at::Tensor& x, const at::Tensor& weight, double eps) {
  raw::NormResult result{at::empty_like(x), at::empty({x.size(0)}, wide_options(x))};
  run(x, [&](cudaStream_t stream) {
    return launch_rms_norm(element_of(x), x.const_data_ptr(), weight.const_data_ptr(),
                           result.y.data_ptr(), result.rstd.data_ptr(), x.size(0), x.size(1), eps,
                           stream);
  });
  return result;
}

bool rms_norm_backward_fits(const at::Tensor& x) {
  return x.size(1) <= longest_norm_row(element_of(x));
}

raw::NormGradients rms_norm_backward(const at::Tensor& dy, const at::Tensor& dh,
                                     const at::Tensor& x, const at::Tensor& weight,
                                     const at::Tensor& rstd) {
  at::Tensor dx = at::empty_like(x),
             partial = at::empty({norm_stripes(x.size(0)), x.size(1)}, wide_options(x));
  run(x, [&](cudaStream_t stream) {
    return launch_rms_norm_backward(
        element_of(x), dy.const_data_ptr(), dh.defined() ? dh.const_data_ptr() : nullptr,
        x.const_data_ptr(), weight.const_data_ptr(), rstd.const_data_ptr(), dx.data_ptr(),
        partial.data_ptr(), x.size(0), x.size(1), stream);
  });
  return {std::move(dx), partial.sum(0)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rope_split_forward(const at::Tensor& qkv,
                                                                  const at::Tensor& cos,
                                                                  const at::Tensor& sin,
                                                                  int64_t batch, int64_t heads,
                                                                  int64_t groups) {
  const int64_t length = qkv.size(0) / batch, d = qkv.size(1) / (heads + 2 * groups);
  const auto empty = [&](int64_t of) { return at::empty({batch, of, length, d}, qkv.options()); };
  at::Tensor q = empty(heads), k = empty(groups), v = empty(groups);
  run(qkv, [&](cudaStream_t stream) {
    return launch_rope_split(element_of(qkv), /*backward=*/false,
                             const_cast<void*>(qkv.const_data_ptr()), cos.const_data_ptr<float>(),
                             sin.const_data_ptr<float>(), heads_of(q), heads_of(k), heads_of(v),
                             qkv.size(0), length, d, stream);
  });
  return {std::move(q), std::move(k), std::move(v)};
}

at::Tensor rope_split_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                               const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t tokens = dq.size(0) * dq.size(2), d = dq.size(3);
  at::Tensor d_qkv = at::empty({tokens, (dq.size(1) + dk.size(1) + dv.size(1)) * d}, dq.options());
  run(d_qkv, [&](cudaStream_t stream) {
    return launch_rope_split(element_of(dq), /*backward=*/true, d_qkv.data_ptr(),
                             cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), heads_of(dq),
                             heads_of(dk), heads_of(dv), tokens, dq.size(2), d, stream);
  });
  return d_qkv;
}

at::Tensor swiglu_forward(const at::Tensor& gate_up) {
  const int64_t rows = gate_up.size(0), n = gate_up.size(1) / 2;
  at::Tensor y = at::empty({rows, n}, gate_up.options());
  run(y, [&](cudaStream_t stream) {
    return launch_swiglu(element_of(gate_up), gate_up.const_data_ptr(), y.data_ptr(), rows, n,
                         stream);
  });
  return y;
}

raw::SwigluGradients swiglu_backward(const at::Tensor& gate_up, const at::Tensor& dy) {
  const int64_t rows = gate_up.size(0), n = gate_up.size(1) / 2;
  raw::SwigluGradients result{at::empty_like(gate_up), at::empty({rows, n}, gate_up.options())};
  run(gate_up, [&](cudaStream_t stream) {
    return launch_swiglu_backward(element_of(gate_up), gate_up.const_data_ptr(),
                                  dy.const_data_ptr(), result.gate_up.data_ptr(),
                                  result.y.data_ptr(), rows, n, stream);
  });
  return result;
}

std::pair<at::Tensor, at::Tensor> exp_rows_(at::Tensor& logits) {
  at::Tensor max = at::empty({logits.size(0)}, wide_options(logits)), sum = at::empty_like(max);
  run(logits, [&](cudaStream_t stream) {
    return launch_exp_rows(element_of(logits), logits.data_ptr(), logits.stride(0), max.data_ptr(),
                           sum.data_ptr(), logits.size(0), logits.size(1), stream);
  });
  return {std::move(max), std::move(sum)};
}

void scale_rows_(at::Tensor& logits, const at::Tensor& factor) {
  run(logits, [&](cudaStream_t stream) {
    return launch_scale_rows(element_of(logits), logits.data_ptr(), logits.stride(0),
                             factor.const_data_ptr(), logits.size(0), logits.size(1), stream);
  });
}

}  // namespace drrl::cuda
