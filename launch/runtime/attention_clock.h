#pragma once

#include <chrono>
#include <memory>

#include "policy/attention/attention_controller.h"

namespace drrl {

/// Attention by `inner`, unchanged, and how long its calls took on this process's CPU: forward,
/// repeated forward passes of activation checkpointing, backward.
class AttentionClock final : public AttentionController {
 public:
  explicit AttentionClock(std::shared_ptr<AttentionController> inner) : inner_(std::move(inner)) {}

  at::Tensor split(int64_t length) override { return inner_->split(length); }
  const Group& context() const override { return inner_->context(); }
  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) override;

  /// Of all calls so far, those without a backward pass too.
  double seconds() const { return std::chrono::duration<double>(*spent_).count(); }

 private:
  using Clock = std::chrono::steady_clock;

  std::shared_ptr<AttentionController> inner_;
  std::shared_ptr<Clock::duration> spent_ = std::make_shared<Clock::duration>(
      0);  // hooks may outlive the clock
};

}  // namespace drrl
