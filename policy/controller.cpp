#include "policy/controller.h"

#include <ATen/detail/CUDAHooksInterface.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/attention_part.h"
#include "core/gram.h"

namespace drrl {
namespace {

class Stopwatch {
 public:
  Stopwatch(bool on, const at::Device& device) : on_(on), cuda_(device.is_cuda()) {
    if (on_) {
      wait();
      start_ = std::chrono::steady_clock::now();
    }
  }
  double ms() const {
    if (!on_) {
      return 0;
    }
    wait();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  void wait() const {
    if (cuda_) {
      at::detail::getCUDAHooks().deviceSynchronize(at::detail::getCUDAHooks().getCurrentDevice());
    }
  }
  bool on_;
  bool cuda_;
  std::chrono::steady_clock::time_point start_;
};

// Share of the energy lost at every rank, from a spectrum: [N, d] -> [N, d + 1].
at::Tensor relative_loss(const at::Tensor& singular_values) {
  const auto energy = singular_values.pow(2);
  const auto tail = energy.flip(1).cumsum(1).flip(1);  // column r: sum of the values from r on
  const auto total = tail.narrow(1, 0, 1).clamp_min(1e-300);
  return at::cat({tail / total, at::zeros_like(total)}, 1);
}

}  // namespace

FarBases solve_far_bases(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o, const BlockTree& tree,
                         bool scores, bool values) {
  return solve_far_bases(pair_grams(q.detach(), k.detach(), v.detach(), tree), w_o, scores, values);
}

FarBases solve_far_bases(const PairGrams& grams, const at::Tensor& w_o, bool scores, bool values) {
  at::NoGradGuard no_grad;
  FarBases bases;
  if (scores) {
    bases.scores = solve_basis(grams.queries.flatten(0, 2), grams.keys.flatten(0, 2));
  }
  if (values) {
    const auto weight = output_gram(w_o, grams.values.size(1), grams.values.size(4)).unsqueeze(1).expand_as(grams.values);
    bases.values = solve_basis(grams.values.flatten(0, 2), weight.flatten(0, 2));
  }
  return bases;
}

LowRankController::LowRankController(std::shared_ptr<RankPolicy> policy, Geometry geometry)
    : policy_(std::move(policy)), geometry_(geometry) {}

at::Tensor LowRankController::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                                     std::shared_ptr<LayerPlan>& plan) {
  if (plan != nullptr) {  // recomputation: the same ranks and bases, counted once
    return plan->lowrank == nullptr ? exact_attention(q, k, v) : lowrank_attention(q, k, v, plan->lowrank);
  }
  plan = std::make_shared<LayerPlan>();
  const Stopwatch total(timing_, q.device());
  const int64_t batch = q.size(0), heads = q.size(1), groups = k.size(1), length = q.size(2), d = q.size(3);
  const bool with_backward = at::GradMode::is_enabled() && q.requires_grad();
  const double exact_flops = exact_attention_flops(batch, heads, length, d, with_backward);
  statistics_.calls += 1;
  statistics_.exact_flops += exact_flops;

  const BlockTree tree(length, geometry_);
  if (tree.num_pairs() == 0) {
    statistics_.flops += exact_flops;
    const auto out = exact_attention(q, k, v);
    statistics_.attention_ms += total.ms();
    return out;
  }

  LayerObservation observation{layer, batch, groups, d, tree, {}, {}};
  FarBases bases;
  int64_t solves = 0;
  double solve_ms = 0;
  const int64_t items = batch * groups * tree.num_pairs();
  const auto solve = [&](bool scores, bool values) {
    const Stopwatch watch(timing_, q.device());
    bases = solve_far_bases(q, k, v, w_o, tree, scores, values);
    solves = items * ((scores ? 1 : 0) + (values ? 1 : 0));
    solve_ms = watch.ms();
  };
  if (policy_->needs_spectra()) {
    solve(true, true);
    observation.score_loss = relative_loss(bases.scores.singular_values);
    observation.value_loss = relative_loss(bases.values.singular_values);
  }
  std::vector<Ranks> ranks = policy_->decide(observation);
  TORCH_CHECK(static_cast<int64_t>(ranks.size()) == items, "rank policy '", policy_->describe(), "' returned ", ranks.size(),
              " decisions for layer ", layer, ", expected ", items);
  const bool low_scores = std::any_of(ranks.begin(), ranks.end(), [&](const Ranks& r) { return r.qk < d; });
  const bool low_values = std::any_of(ranks.begin(), ranks.end(), [&](const Ranks& r) { return r.v < d; });
  for (const Ranks& r : ranks) {
    statistics_.rank_qk += static_cast<double>(r.qk);
    statistics_.rank_v += static_cast<double>(r.v);
  }
  statistics_.decisions += items;

  at::Tensor out;
  double flops = exact_flops;
  if (low_scores || low_values) {
    if (solves == 0) {
      solve(low_scores, low_values);
    }
    plan->lowrank = c10::make_intrusive<LowRankPlan>(tree, std::move(ranks), bases.scores, bases.values);
    out = lowrank_attention(q, k, v, plan->lowrank);
    const AttentionFlops counted = lowrank_attention_flops(*plan->lowrank, batch, heads, groups, d, solves, with_backward);
    flops = counted.total() + (low_values ? 2.0 * static_cast<double>(w_o.size(0) * heads * d * d) : 0.0);  // and G_o
  } else {
    out = exact_attention(q, k, v);
    flops += static_cast<double>(solves) * basis_solve_flops(d);
  }
  statistics_.flops += flops;
  statistics_.solves += solves;
  statistics_.solve_ms += solve_ms;
  statistics_.attention_ms += total.ms();
  return out;
}

std::unique_ptr<KvCache> LowRankController::make_cache(int64_t layers, int64_t horizon) const {
  return policy_->exact() ? AttentionController::make_cache(layers, horizon) : std::make_unique<KvCache>(layers, horizon, geometry_);
}

at::Tensor LowRankController::extend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                                     KvCache& cache) {
  const Stopwatch total(timing_, q.device());
  LayerCache& mine = cache.layer(layer);
  auto out = mine.extend(q, k, v, [&](int64_t level, int64_t pair, const PairGrams& grams) {
    return decide_node(layer, mine.horizon(), level, pair, grams, w_o);
  });
  statistics_.calls += 1;
  statistics_.attention_ms += total.ms();
  return out;
}

NodeFactors LowRankController::decide_node(int64_t layer, const BlockTree& horizon, int64_t level, int64_t pair, const PairGrams& grams,
                                           const at::Tensor& w_o) {
  const Stopwatch watch(timing_, w_o.device());
  const int64_t batch = grams.keys.size(0), groups = grams.keys.size(1), d = grams.keys.size(4);
  const int64_t items = batch * groups;
  // Policies without spectra decide for a whole tree; those with spectra look at each pair alone, so a tree of this one serves.
  const BlockTree alone(2, {1, 0});
  const bool spectra = policy_->needs_spectra();
  LayerObservation observation{layer, batch, groups, d, spectra ? alone : horizon, {}, {}};
  FarBases bases;
  if (spectra) {
    bases = solve_far_bases(grams, w_o, true, true);
    observation.score_loss = relative_loss(bases.scores.singular_values);
    observation.value_loss = relative_loss(bases.values.singular_values);
  }
  const std::vector<Ranks> decided = policy_->decide(observation);
  const int64_t pairs = observation.tree.num_pairs();
  TORCH_CHECK(static_cast<int64_t>(decided.size()) == items * pairs, "rank policy '", policy_->describe(), "' returned ", decided.size(),
              " decisions for layer ", layer, ", expected ", items * pairs);
  NodeFactors factors;
  bool low_scores = false, low_values = false;
  for (int64_t item = 0; item < items; ++item) {
    const Ranks& ranks = decided[static_cast<size_t>(item * pairs + (spectra ? 0 : horizon.pair_index(level, pair)))];
    factors.ranks.push_back(ranks);
    low_scores = low_scores || ranks.qk < d;
    low_values = low_values || ranks.v < d;
    statistics_.rank_qk += static_cast<double>(ranks.qk);
    statistics_.rank_v += static_cast<double>(ranks.v);
  }
  statistics_.decisions += items;
  if (!spectra) {
    bases = solve_far_bases(grams, w_o, low_scores, low_values);
  }
  statistics_.solves += items * ((spectra || low_scores ? 1 : 0) + (spectra || low_values ? 1 : 0));
  statistics_.solve_ms += watch.ms();
  factors.scores = std::move(bases.scores);
  factors.values = std::move(bases.values);
  return factors;
}

std::string LowRankController::describe() const {
  return c10::str("near block ", geometry_.near_block, ", sinks ", geometry_.sink_tokens, ", ranks: ", policy_->describe());
}

AttentionStatistics LowRankController::take_statistics() { return std::exchange(statistics_, {}); }

}  // namespace drrl
