#include <ATen/ATen.h>

#include <cmath>

#include "policy/attention.h"

namespace drrl {
namespace {

class FullAttention final : public AttentionController {
 public:
  at::Tensor attend(int64_t /*layer*/, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& /*w_o*/,
                    std::shared_ptr<LayerPlan>& /*plan*/) override {
    return at::scaled_dot_product_attention(q, k, v, /*attn_mask=*/{}, /*dropout_p=*/0.0, /*is_causal=*/true,
                                            /*scale=*/{}, /*enable_gqa=*/q.size(1) != k.size(1));
  }
};

}  // namespace

std::shared_ptr<AttentionController> make_full_attention() { return std::make_shared<FullAttention>(); }

}  // namespace drrl
