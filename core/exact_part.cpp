#include "core/exact_part.h"

#include <cmath>

namespace drrl {
namespace {

bool is_half(const at::Tensor& x) { return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf; }

// CUDA kernels give and want the log-sum-exp in rows padded to a multiple of 32.
at::Tensor padded_logsumexp(const at::Tensor& logsumexp) {
  const int64_t rows = logsumexp.size(2);
  const int64_t padded = (rows + 31) / 32 * 32;
  return rows == padded ? logsumexp.contiguous() : at::constant_pad_nd(logsumexp, {0, padded - rows});
}

}  // namespace

PartOutput attention_part(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal, double scale) {
  if (!q.is_cuda()) {
    auto [out, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, {}, scale);
    return {out, logsumexp};
  }
  if (is_half(q)) {
    auto result = at::_scaled_dot_product_flash_attention(q, k, v, 0.0, causal, /*return_debug_mask=*/false, scale);
    return {std::get<0>(result), std::get<1>(result)};
  }
  auto result = at::_scaled_dot_product_efficient_attention(q, k, v, /*attn_bias=*/{}, /*compute_log_sumexp=*/true, 0.0, causal, scale);
  return {std::get<0>(result), std::get<1>(result).narrow(2, 0, q.size(2))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_part_backward(const at::Tensor& grad_out, const at::Tensor& q,
                                                                       const at::Tensor& k, const at::Tensor& v,
                                                                       const at::Tensor& out, const at::Tensor& logsumexp,
                                                                       bool causal, double scale) {
  if (!q.is_cuda()) {
    // The kernel reads the log-sum-exp of [N, h, Lq] with the heads innermost, as its forward returns it.
    const auto heads_innermost = logsumexp.transpose(1, 2).contiguous().transpose(1, 2);
    return at::_scaled_dot_product_flash_attention_for_cpu_backward(grad_out, q, k, v, out, heads_innermost, 0.0, causal, {}, scale);
  }
  // No dropout: the random state is not read.
  const auto state = at::zeros({2}, q.options().dtype(at::kUInt64));
  const auto unused = at::empty({0}, q.options().dtype(at::kUInt64));
  if (is_half(q)) {
    return at::_scaled_dot_product_flash_attention_backward(grad_out, q, k, v, out, logsumexp.contiguous(), {}, {}, q.size(2), k.size(2),
                                                            0.0, causal, state, unused, scale);
  }
  auto [grad_q, grad_k, grad_v, grad_bias] = at::_scaled_dot_product_efficient_attention_backward(
      grad_out, q, k, v, /*attn_bias=*/{}, out, padded_logsumexp(logsumexp), state, unused, 0.0, {true, true, true, false}, causal, scale);
  return {grad_q, grad_k, grad_v};
}

at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && q.size(1) % k.size(1) == 0 && q.size(0) == k.size(0) &&
                  q.size(2) == k.size(2) && q.size(3) == k.size(3),
              "exact_attention: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
              ", expected q [B, H, L, d], k and v [B, G, L, d] with H a multiple of G");
  const int64_t heads = q.size(1) / k.size(1);
  const auto by_group = [&](const at::Tensor& x) {  // [B, H or G, L, d] -> [B G, heads, L, d]
    const auto split = x.reshape({k.size(0) * k.size(1), -1, x.size(2), x.size(3)});
    return split.size(1) == heads ? split : split.expand({-1, heads, -1, -1});
  };
  return at::scaled_dot_product_attention(by_group(q), by_group(k), by_group(v), {}, 0.0, /*is_causal=*/true).reshape(q.sizes());
}

}  // namespace drrl
