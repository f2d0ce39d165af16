#pragma once

#include <tuple>
#include <utility>

#include <ATen/ATen.h>

namespace drrl {

// One part of attention rows: softmax over some of the keys only, with what is needed to merge it
// with other parts.
//
// Shapes: problems of g query heads that share one set of keys and values,
//   q          [N1, N2, g, Lq, dk]      k  [N1, N2, Lk, dk]      v  [N1, N2, Lk, dv]
//   out        [N1, N2, g, Lq, dv]      logsumexp, delta  [N1, N2, g, Lq]
// logsumexp and delta are float32, for float64 inputs float64.
// Any strides with a contiguous last dimension, so that blocks, heads and groups of a larger tensor
// are views and nothing is copied to get them here. dk and dv may differ. `causal` needs Lq == Lk
// and masks keys after the query.
//
// float32 on CPUs with AVX2 runs on drrl's own kernel (core/cpu); half precision on CUDA on
// cuDNN's, where PyTorch would choose it; everything else on PyTorch's flash kernels at width
// max(dk, dv). These and cuDNN's get zero columns up to kernel_width: scores and values do not
// change.

/// The next multiple of 8, which is what they take on CUDA in half precision.
constexpr int64_t kernel_width(int64_t columns) {
  return (columns + 7) / 8 * 8;
}

/// out <- softmax(scale q k^T) v, normalized over this part's keys, and its log-sum-exp.
void attention_part(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
                    double scale, at::Tensor out, at::Tensor logsumexp);

/// Gradients of one part of a merged attention. `logsumexp` is that of all parts together and
/// `delta` the rowsum(grad_out * out) of the merged output: with them exp(score - logsumexp) is the
/// merged softmax and delta its correction, as in ring attention (arXiv 2310.01889). grad_q,
/// grad_k, grad_v <- written, the latter two summed over the g heads. Does not depend on the number
/// of threads.
void attention_part_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v, const at::Tensor& logsumexp,
                             const at::Tensor& delta, bool causal, double scale, at::Tensor grad_q,
                             at::Tensor grad_k, at::Tensor grad_v);

/// attention_part of n items that have rows only: q [n, Lq, dk], k [n, Lk, dk], v [n, Lk, dv] ->
/// out [n, Lq, dv] and log-sum-exp [n, Lq]; not causal.
std::pair<at::Tensor, at::Tensor> attention_rows(const at::Tensor& q, const at::Tensor& k,
                                                 const at::Tensor& v, double scale);

/// attention_part_backward likewise: the gradients of q, k and v.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_rows_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& logsumexp, const at::Tensor& delta, double scale);

/// Exact causal attention, softmax(q k^T / sqrt(d)) v: q [B, H, L, d], k and v [B, G, L, d] -> [B,
/// H, L, d]. Query head h reads group h / (H / G); keys are not copied for each head.
/// Differentiable in q, k, v. Errors: c10::Error on other shapes.
at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

}  // namespace drrl
