#include "policy/attention/rank_decider.h"

#include <algorithm>
#include <utility>

#include "core/attention/flops.h"
#include "distributed/collectives/agreement.h"
#include "policy/calibration/pair_features.h"

namespace drrl {
namespace {

// Share of the energy lost at every rank, from a spectrum: [N, d] -> [N, d + 1].
at::Tensor relative_loss(const at::Tensor& singular_values) {
  const auto energy = singular_values.pow(2);
  const auto tail = energy.flip(1).cumsum(1).flip(1);  // column r: sum of the values from r on
  const auto total = tail.narrow(1, 0, 1).clamp_min(1e-300);
  return at::cat({tail / total, at::zeros_like(total)}, 1);
}

uint64_t fold(uint64_t digest, uint64_t next) {
  const uint64_t both[] = {digest, next};
  return hash_bytes(both, sizeof both);
}

}  // namespace

RankDecider::RankDecider(std::shared_ptr<RankPolicy> policy, GuardOptions guard, at::Tensor start)
    : policy_(std::move(policy)),
      guard_(std::move(guard)),
      first_eps_(guard_.eps),
      start_(std::move(start)) {
  TORCH_CHECK(guard_.eps == 0 || (guard_.eps > 0 && start_.defined() && !guard_.buckets.empty()),
              "RankDecider: a guard of eps ", guard_.eps, " needs starting bases and buckets");
}

bool RankDecider::needs_grams() const {
  return policy_->needs_spectra() || !policy_->state_ranks().empty() || guarded();
}

RankDecision RankDecider::decide(LayerObservation& observation, const PairGrams& grams,
                                 const at::Tensor& w_o) {
  RankDecision decision;
  if (policy_->needs_spectra()) {
    decision.bases = solve_far_bases(grams, w_o, /*scores=*/true, /*values=*/true);
    observation.score_loss = relative_loss(decision.bases.scores.singular_values);
    observation.value_loss = relative_loss(decision.bases.values.singular_values);
  }
  if (const auto state_ranks = policy_->state_ranks(); !state_ranks.empty()) {
    TORCH_CHECK(start_.defined(), "rank policy '", policy_->describe(),
                "' needs the starting bases of a calibration");
    observation.state = pair_state(grams, w_o, observation.heads / observation.groups,
                                   for_batch(start_[observation.layer], observation.batch),
                                   observation.tree, observation.first_pair, state_ranks);
    decision.bases.flops += static_cast<double>(observation.items()) *
                            (start_loss_flops(observation.head_dim) + policy_->flops_per_pair());
  }
  decision.ranks = policy_->decide(observation);
  TORCH_CHECK(static_cast<int64_t>(decision.ranks.size()) == observation.items(), "rank policy '",
              policy_->describe(), "' returned ", decision.ranks.size(), " decisions for layer ",
              observation.layer, ", expected ", observation.items());
  if (guarded()) {
    raise_to_guard(observation, grams, w_o, decision);
  }
  remember(observation.layer, decision.ranks);
  return decision;
}

void RankDecider::raise_to_guard(const LayerObservation& observation, const PairGrams& grams,
                                 const at::Tensor& w_o, RankDecision& decision) const {
  const int64_t d = observation.head_dim;
  const StartLoss loss = start_loss(grams, w_o,
                                    for_batch(start_[observation.layer], observation.batch));
  decision.bases.flops += static_cast<double>(observation.items()) * start_loss_flops(d);
  const auto raise_all = [&](const at::Tensor& losses, int64_t Ranks::* kind) {
    const double* lost = losses.const_data_ptr<double>();  // [d + 1] of one item
    for (Ranks& ranks : decision.ranks) {
      const int64_t chosen = ranks.*kind;
      int64_t& rank = ranks.*kind;
      while (rank < d && lost[rank] > guard_.eps * guard_.eps * lost[0]) {
        rank = *std::upper_bound(guard_.buckets.begin(), guard_.buckets.end(), rank);
      }
      decision.guard_raises += rank > chosen ? 1 : 0;
      lost += d + 1;
    }
  };
  raise_all(loss.scores.contiguous(), &Ranks::qk);
  raise_all(loss.values.contiguous(), &Ranks::v);
}

void RankDecider::remember(int64_t layer, const std::vector<Ranks>& ranks) {
  std::vector<double> decided = {static_cast<double>(layer)};
  for (const Ranks& r : ranks) {
    decided.insert(decided.end(), {static_cast<double>(r.qk), static_cast<double>(r.v), r.gate});
    if (r.drops()) {
      decided.push_back(r.drop);
    }
  }
  digest_ = fold(digest_, hash_bytes(decided.data(), decided.size() * sizeof(double)));
}

uint64_t RankDecider::digest(const std::string& description) const {
  return fold(hash_bytes(description), digest_);
}

uint64_t RankDecider::take_digest(const std::string& description) {
  return fold(hash_bytes(description), std::exchange(digest_, 0));
}

}  // namespace drrl
