#pragma once

#include <cstdint>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace drrl {

/// What a model hands over when it asks for one layer's attention.
struct AttentionCall {
  int64_t layer;          ///< 0-based
  const at::Tensor& q;    ///< [B, H, L, d]
  const at::Tensor& k;    ///< [B, G, L, d], H a multiple of G
  const at::Tensor& v;    ///< [B, G, L, d]
  const at::Tensor& w_o;  ///< [hidden, H d], the output projection that will follow

  int64_t batch() const { return q.size(0); }
  int64_t heads() const { return q.size(1); }
  int64_t groups() const { return k.size(1); }
  int64_t length() const { return q.size(2); }
  int64_t head_dim() const { return q.size(3); }
  /// Whether a backward pass will follow.
  bool with_backward() const { return at::GradMode::is_enabled() && q.requires_grad(); }
};

}  // namespace drrl
