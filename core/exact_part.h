#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace drrl {

/// One part of an attention row: softmax over some of the keys only, with what is needed to merge it with other parts.
struct PartOutput {
  at::Tensor out;        ///< [N, h, Lq, w], normalized over this part's keys
  at::Tensor logsumexp;  ///< [N, h, Lq] float32, of this part's scaled scores
};

/// Attention of q [N, h, Lq, w] to k, v [N, h, Lk, w] by PyTorch's flash kernels (CPU: any float type; CUDA: flash for 16-bit types,
/// memory-efficient for float32). Heads of k and v may be expanded (stride 0). `causal` needs Lq == Lk.
PartOutput attention_part(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal, double scale);

/// Gradients (dq, dk, dv) of one part. `out` and `logsumexp` are those of the *merged* attention, restricted to this part's rows: with
/// them the kernel's exp(score - logsumexp) is the merged softmax and its rowsum(grad_out * out) the merged correction, as in
/// ring attention (arXiv 2310.01889).
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_part_backward(const at::Tensor& grad_out, const at::Tensor& q,
                                                                       const at::Tensor& k, const at::Tensor& v,
                                                                       const at::Tensor& out, const at::Tensor& logsumexp,
                                                                       bool causal, double scale);

/// Exact causal attention, softmax(q k^T / sqrt(d)) v: q [B, H, L, d], k and v [B, G, L, d] -> [B, H, L, d]. Keys are shared between the heads of
/// a group without being copied. Differentiable through PyTorch's own backward.
at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

}  // namespace drrl
