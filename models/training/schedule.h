#pragma once

#include <cstdint>

namespace drrl {

/// Learning rate as a function of tokens, not of steps, so that a change of the batch size keeps
/// the shape of the run:
///
///   t < warmup:            lr * t / warmup
///   warmup <= t < total:   min_lr + (lr - min_lr)
///                          * (1 + cos(pi * (t - warmup) / (total - warmup))) / 2
///   t >= total:            min_lr
///
/// The update that ends at token t uses rate(t): the first update is never a zero step and the last
/// one is made at min_lr.
struct CosineSchedule {
  double lr = 0;              ///< the peak
  double min_lr = 0;          ///< the end, <= lr
  int64_t warmup_tokens = 0;  ///< < total_tokens
  int64_t total_tokens = 0;   ///< > 0

  /// Errors: Error(kUsage) for a negative rate, min_lr > lr, or a warm-up that does not end before
  /// the run.
  void validate() const;

  double rate(int64_t tokens) const;
};

}  // namespace drrl
