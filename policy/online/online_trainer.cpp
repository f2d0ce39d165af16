#include "policy/online/online_trainer.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "core/error.h"
#include "policy/calibration/damage_sampler.h"

namespace drrl {
namespace {

// What is supposed of the noise before it is known, and how many samples' word that has.
constexpr double kFirstDispersion = 20, kFirstSamples = 1000;
constexpr int kSweeps = 30, kNewtonSteps = 4;

}  // namespace

OnlineTrainer::OnlineTrainer(const Calibration& calibration, double memory)
    : memory_(memory),
      base_(calibration.damage.contiguous()),
      log_factors_(at::zeros_like(base_)),
      scatter_(kFirstDispersion * kFirstSamples),
      scattered_(kFirstSamples) {
  TORCH_CHECK(memory > 0 && memory <= 1, "OnlineTrainer: a memory of ", memory,
              ", expected more than 0 and at most 1");
  auto sizes = base_.sizes().vec();
  sizes.insert(sizes.begin(), DamageSampler::kSums);
  known_ = at::zeros(sizes, at::kDouble);
  const auto effect = [&](std::vector<int64_t> over, double sigma) {
    auto shape = base_.sizes().vec();
    for (const int64_t dim : over) {
      shape[static_cast<size_t>(dim)] = 1;
    }
    effects_.push_back({std::move(over), sigma, at::zeros(shape, at::kDouble)});
  };
  // dims: layer, group, kind, level, rank. The first takes up what is common to all, such as the
  // difference between drawn and real labels.
  effect({0, 1, 3, 4}, 3.0);
  effect({0, 1}, 0.5);
  effect({1, 3, 4}, 0.5);
  effect({3, 4}, 0.3);
  effect({4}, 0.3);
  effect({}, 0.3);
}

void OnlineTrainer::update(const at::Tensor& sums) {
  TORCH_CHECK(sums.sizes() == known_.sizes(), "OnlineTrainer: sums ", sums.sizes(), ", expected ",
              known_.sizes());
  check(ErrorKind::kNumerics, sums.isfinite().all().item<bool>(),
        "the policy's trainer: measured damages that are not finite");
  known_.mul_(memory_).add_(sums);
  fit();
  // How far the new samples scatter about what was just fitted; then once more with that.
  const auto count = sums[DamageSampler::kCount] * (base_ > 0);
  const auto errors = at::where(
      count > 0,
      sums[DamageSampler::kDamage] / (base_ * log_factors_.exp()).clamp_min(1e-300) - count,
      at::zeros_like(count));
  scatter_ = memory_ * scatter_ + errors.sum(at::IntArrayRef{1, 3, 4}).pow(2).sum().item<double>();
  scattered_ = memory_ * scattered_ + count.sum().item<double>();
  fit();
  ++updates_;
}

void OnlineTrainer::fit() {
  const auto learned = base_ > 0;
  const auto count = known_[DamageSampler::kCount] * learned / dispersion();
  const auto damage = at::where(learned, known_[DamageSampler::kDamage] / base_.clamp_min(1e-300),
                                at::zeros_like(base_)) /
                      dispersion();
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (Effect& effect : effects_) {
      const auto shared = [&](const at::Tensor& x) {
        return effect.over.empty() ? x : x.sum(effect.over, /*keepdim=*/true);
      };
      const auto total = shared(damage * (-log_factors_).exp()), samples = shared(count);
      const double precision = 1 / (effect.sigma * effect.sigma);
      auto change = at::zeros_like(effect.value);
      for (int step = 0; step < kNewtonSteps;
           ++step) {  // minimizes total e^-change + samples change + (value + change)^2 precision /
                      // 2
        const auto curved = total * (-change).exp();
        change += ((curved - samples - (effect.value + change) * precision) / (curved + precision))
                      .clamp(-1, 1);
      }
      effect.value += change;
      log_factors_ += change;
    }
  }
}

at::Tensor OnlineTrainer::state() const {
  std::vector<at::Tensor> all = {
      known_.flatten(), log_factors_.flatten(),
      at::tensor({scatter_, scattered_, static_cast<double>(updates_)}, at::kDouble)};
  for (const Effect& effect : effects_) {
    all.push_back(effect.value.flatten());
  }
  return at::cat(all);
}

void OnlineTrainer::load(const at::Tensor& state) {
  const int64_t expected = this->state().numel();
  check(ErrorKind::kCheckpoint, state.numel() == expected, "the policy trainer's state has ",
        state.numel(), " elements, expected ", expected);
  int64_t at = 0;
  const auto take = [&](const at::Tensor& into) {
    into.copy_(state.narrow(0, at, into.numel()).view(into.sizes()));
    at += into.numel();
  };
  take(known_);
  take(log_factors_);
  auto figures = at::empty({3}, at::kDouble);
  take(figures);
  scatter_ = figures[0].item<double>();
  scattered_ = figures[1].item<double>();
  updates_ = figures[2].item<int64_t>();
  for (Effect& effect : effects_) {
    take(effect.value);
  }
}

}  // namespace drrl
