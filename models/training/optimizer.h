#pragma once

#include <map>
#include <string>
#include <vector>

#include <ATen/ATen.h>

namespace drrl {

struct Parameter;

/// AdamW (Loshchilov & Hutter, arXiv 1711.05101) through ATen's fused kernel, the one behind
/// torch.optim.AdamW(fused=True):
///
///   w <- w - lr * weight_decay * w             (only where Parameter::decay)
///   m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
///   w <- w - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
///
/// Master weights and both moments are fp32. State is local to a rank: each rank holds the moments
/// of its own shards.
class AdamW {
 public:
  struct Options {
    double beta1 = 0.9;
    double beta2 = 0.95;
    double eps = 1e-8;
    double weight_decay = 0.1;

    /// Errors: Error(kUsage) for values outside [0, 1) (betas) or negative ones.
    void validate() const;
  };

  /// `parameters` must outlive the optimizer.
  AdamW(std::vector<Parameter>& parameters, const Options& options);

  /// One update with rate `lr` from the parameters' gradients, each multiplied by `gradient_scale`
  /// first (that is where clipping happens, at no extra pass over memory). Every parameter must
  /// have a gradient.
  void step(double lr, double gradient_scale = 1.0);

  int64_t steps_taken() const;

  /// Live tensors by name ("exp_avg.NAME", "exp_avg_sq.NAME", "step"): a checkpoint writes them,
  /// and copies into them to resume.
  std::map<std::string, at::Tensor> state() const;

 private:
  struct Group {
    double weight_decay = 0;
    std::vector<at::Tensor> values, exp_avgs, exp_avg_sqs, steps;
  };

  std::vector<Parameter>& parameters_;
  Options options_;
  at::Tensor
      step_;  // [] fp32 on the parameters' device, shared by all of them: the kernel only reads it
  Group decayed_, plain_;
};

}  // namespace drrl
