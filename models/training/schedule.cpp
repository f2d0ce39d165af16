#include "models/training/schedule.h"

#include <cmath>
#include <numbers>

#include "core/error.h"

namespace drrl {

void CosineSchedule::validate() const {
  check(ErrorKind::kUsage, std::isfinite(lr) && lr > 0, "lr must be positive, got ", lr);
  check(ErrorKind::kUsage, min_lr >= 0 && min_lr <= lr, "min_lr must lie in [0, lr = ", lr,
        "], got ", min_lr);
  check(ErrorKind::kUsage, total_tokens > 0, "the run must have at least one token, got ",
        total_tokens);
  check(ErrorKind::kUsage, warmup_tokens >= 0 && warmup_tokens < total_tokens,
        "warmup_tokens = ", warmup_tokens, " must lie in [0, ", total_tokens,
        "), the tokens of the whole run");
}

double CosineSchedule::rate(int64_t tokens) const {
  if (tokens < warmup_tokens) {
    return lr * static_cast<double>(tokens) / static_cast<double>(warmup_tokens);
  }
  if (tokens >= total_tokens) {
    return min_lr;
  }
  const double progress = static_cast<double>(tokens - warmup_tokens) /
                          static_cast<double>(total_tokens - warmup_tokens);
  return min_lr + (lr - min_lr) * 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
}

}  // namespace drrl
