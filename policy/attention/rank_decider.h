#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "core/attention/far_bases.h"
#include "core/linalg/gram.h"
#include "policy/rank_policy.h"

namespace drrl {

/// The guard over decisions ("actions whose certified loss exceeds eps are masked", arXiv
/// 2512.15973): a pair's rank is raised to the smallest bucket at which the starting bases lose at
/// most the share eps of the root of the energy, by start_loss; updates only lose less. Full rank
/// is always allowed.
struct GuardOptions {
  double eps = 0;                     ///< 0: no guard
  std::vector<int64_t> buckets = {};  ///< ascending, head_dim the last
};

/// The ranks of a layer's far pairs, one entry per (batch, KV group, pair), and what choosing them
/// took.
struct RankDecision {
  std::vector<Ranks> ranks;
  int64_t guard_raises = 0;  ///< ranks of scores or values that the guard raised
  FarBases bases;  ///< made of spectra that the policy looked at, else undefined; the cost
};

/// Decides: asks the policy, showing it what it wants to see, and puts the guard over it.
class RankDecider {
 public:
  /// start: the calibration's starting bases, [layers, G, 2, d, d], or undefined. Errors:
  /// c10::Error for a guard without them or without buckets.
  RankDecider(std::shared_ptr<RankPolicy> policy, GuardOptions guard, at::Tensor start);

  /// Whether `decide` looks at Grams.
  bool needs_grams() const;

  /// grams: of the observation's pairs and all query heads; unused unless needs_grams(). w_o
  /// [hidden, H d]. Fills in what the policy looks at. Errors: c10::Error if the policy returns
  /// another number of decisions, or looks at the starting bases and there are none.
  RankDecision decide(LayerObservation& observation, const PairGrams& grams, const at::Tensor& w_o);

  /// 64-bit hash of `description` and of all decisions since the last take_digest.
  uint64_t digest(const std::string& description) const;
  uint64_t take_digest(const std::string& description);

  const std::shared_ptr<RankPolicy>& policy() const { return policy_; }
  void set_policy(std::shared_ptr<RankPolicy> policy) { policy_ = std::move(policy); }

  /// The guard's eps from now on; only if there was one.
  void set_guard_eps(double eps) { guard_.eps = eps; }
  /// As constructed.
  double first_guard_eps() const { return first_eps_; }

 private:
  bool guarded() const { return guard_.eps > 0 && !policy_->exact(); }
  void raise_to_guard(const LayerObservation& observation, const PairGrams& grams,
                      const at::Tensor& w_o, RankDecision& decision) const;
  void remember(int64_t layer, const std::vector<Ranks>& ranks);

  std::shared_ptr<RankPolicy> policy_;
  GuardOptions guard_;
  double first_eps_;
  at::Tensor start_;
  uint64_t digest_ = 0;
};

}  // namespace drrl
