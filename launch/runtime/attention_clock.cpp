#include "launch/runtime/attention_clock.h"

namespace drrl {

at::Tensor AttentionClock::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                  const at::Tensor& v, const at::Tensor& w_o,
                                  std::shared_ptr<LayerPlan>& plan) {
  const auto start = Clock::now();
  auto out = inner_->attend(layer, q, k, v, w_o, plan);
  *spent_ += Clock::now() - start;
  if (out.requires_grad() &&
      q.requires_grad()) {  // the gradient of `out` comes in just before the backward pass of
                            // attention, that of q just after it
    const auto began = std::make_shared<Clock::time_point>();
    out.register_hook([began](const at::Tensor&) { *began = Clock::now(); });
    q.register_hook(
        [began, spent = spent_](const at::Tensor&) { *spent += Clock::now() - *began; });
  }
  return out;
}

}  // namespace drrl
