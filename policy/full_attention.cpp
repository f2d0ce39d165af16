
#include "core/attention_part.h"
#include "policy/attention.h"

namespace drrl {
namespace {

class FullAttention final : public AttentionController {
 public:
  at::Tensor attend(int64_t /*layer*/, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& /*w_o*/,
                    std::shared_ptr<LayerPlan>& /*plan*/) override {
    return exact_attention(q, k, v);
  }
};

}  // namespace

std::shared_ptr<AttentionController> make_full_attention() { return std::make_shared<FullAttention>(); }

}  // namespace drrl
