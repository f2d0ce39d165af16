#pragma once

#include <tuple>

#include <ATen/ATen.h>

#include "models/ops/op_results.h"

/// drrl::raw on CUDA tensors, one kernel each: arguments, results and requirements are those of
/// fused_ops.h. Asynchronous. Errors: Error(kInternal) with the CUDA call that failed.
namespace drrl::cuda {

raw::NormResult rms_norm_forward(const at::Tensor& x, const at::Tensor& weight, double eps);
/// Rows of at most 40 KiB in float (double for double).
bool rms_norm_backward_fits(const at::Tensor& x);
raw::NormGradients rms_norm_backward(const at::Tensor& dy, const at::Tensor& dh,
                                     const at::Tensor& x, const at::Tensor& weight,
                                     const at::Tensor& rstd);
std::tuple<at::Tensor, at::Tensor, at::Tensor> rope_split_forward(const at::Tensor& qkv,
                                                                  const at::Tensor& cos,
                                                                  const at::Tensor& sin,
                                                                  int64_t batch, int64_t heads,
                                                                  int64_t groups);
/// The last stride of the gradients is 1.
at::Tensor rope_split_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                               const at::Tensor& cos, const at::Tensor& sin);
at::Tensor swiglu_forward(const at::Tensor& gate_up);
raw::SwigluGradients swiglu_backward(const at::Tensor& gate_up, const at::Tensor& dy);
std::pair<at::Tensor, at::Tensor> exp_rows_(at::Tensor& logits);
void scale_rows_(at::Tensor& logits, const at::Tensor& factor);

}  // namespace drrl::cuda
