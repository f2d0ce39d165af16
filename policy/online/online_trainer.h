#pragma once

#include <ATen/ATen.h>

#include "policy/calibration/calibration.h"

namespace drrl {

/// What the central trainer learns while a model is fine-tuned: how much more or less than the
/// calibration says each layer, KV group, level, kind and rank suffers on the text and with the
/// weights of now. Decisions by the calibrated damages times these factors are the policy.
///
/// A value fit from full information. The action is a rank, the reward of all of them is measured
/// (DamageSampler), and the allocation is the best policy for given damages, so nothing remains to
/// be learned but the expected damage. With y = measured / calibrated damage of a sample,
///   minimize  kappa sum over samples (y e^-f + f)  +  sum over effects a^2 / (2 sigma^2),
/// the gamma deviance, whose minimum is the conditional mean however heavy the tail
/// (agent_training.h, first stage), weighed against Gaussian priors that pull to the calibration. f
/// is a sum of effects that cells share: of a kind, (level, rank), layer, (layer, group), (layer,
/// group, level), and the cell alone, of each kind; so a layer's change is learned long before each
/// of its cells has been seen. kappa, how much is believed, is one over the dispersion, Pearson's
/// estimate (McCullagh and Nelder, Generalized Linear Models, sections 8.3.6 and 9.2), here of the
/// sums over each layer and kind between two updates, since cells are measured on the same few rows
/// and err together. Older samples fade, since the weights move. Solved to convergence by Newton
/// steps, one effect after the other: no rate, no random numbers.
class OnlineTrainer {
 public:
  /// memory: factor on what is known at each update.
  explicit OnlineTrainer(const Calibration& calibration, double memory = 0.98);

  /// Takes in the sums of all processes since the last call, [DamageSampler::kSums, layers, groups,
  /// 2, levels, ranks].
  void update(const at::Tensor& sums);

  /// f, [layers, groups, 2, levels, ranks] float64.
  const at::Tensor& log_factors() const { return log_factors_; }
  /// Variance of a sum of n samples of one layer and kind, each over its mean, divided by n.
  double dispersion() const { return scatter_ / scattered_; }
  int64_t updates() const { return updates_; }

  /// All that it knows, flat float64, and back. Errors: Error(kCheckpoint) if the size is another.
  at::Tensor state() const;
  void load(const at::Tensor& state);

 private:
  struct Effect {
    std::vector<int64_t> over;  // dims whose cells share it
    double sigma;               // standard deviation of its prior
    at::Tensor value;
  };

  void fit();

  double memory_;
  at::Tensor base_;   // calibrated damage; 0: not learned about
  at::Tensor known_;  // faded sums, as update takes them
  std::vector<Effect> effects_;
  at::Tensor log_factors_;
  double scatter_, scattered_;  // faded sums over layers and kinds of squared errors, and of
                                // samples: the dispersion is their ratio
  int64_t updates_ = 0;
};

}  // namespace drrl
