
#include "policy/attention/attention_controller.h"

#include "core/attention/exact_attention.h"
#include "core/attention/kv_cache.h"

namespace drrl {
namespace {

class ExactAttention final : public AttentionController {
 public:
  at::Tensor attend(int64_t /*layer*/, const at::Tensor& q, const at::Tensor& k,
                    const at::Tensor& v, const at::Tensor& /*w_o*/,
                    std::shared_ptr<LayerPlan>& /*plan*/) override {
    return exact_attention(q, k, v);
  }
};

}  // namespace

const Group& AttentionController::context() const {
  static const Group alone;
  return alone;
}

std::unique_ptr<KvCache> AttentionController::make_cache(int64_t layers, int64_t horizon) const {
  return std::make_unique<KvCache>(layers, horizon, Geometry{horizon, 0});
}

at::Tensor AttentionController::extend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                       const at::Tensor& v, const at::Tensor& /*w_o*/,
                                       KvCache& cache) {
  return cache.layer(layer).extend(q, k, v, /*decide=*/nullptr);
}

std::shared_ptr<AttentionController> make_exact_attention() {
  return std::make_shared<ExactAttention>();
}

}  // namespace drrl
