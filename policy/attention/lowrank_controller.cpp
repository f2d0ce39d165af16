#include "policy/attention/lowrank_controller.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/attention/exact_attention.h"
#include "core/attention/lowrank_attention.h"
#include "core/cpu_clock.h"
#include "core/device.h"
#include "core/error.h"
#include "distributed/attention/context_bases.h"
#include "distributed/collectives/agreement.h"
#include "policy/calibration/pair_features.h"

namespace drrl {
namespace {

class Stopwatch {
 public:
  Stopwatch(bool on, const at::Device& device) : on_(on), device_(device) {
    if (on_) {
      synchronize(device_);
      start_ = std::chrono::steady_clock::now();
      cpu_start_ms_ = drrl::cpu_ms(CLOCK_THREAD_CPUTIME_ID);
    }
  }
  double ms() const {
    if (!on_) {
      return 0;
    }
    synchronize(device_);
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_)
        .count();
  }
  double cpu_ms() const { return on_ ? drrl::cpu_ms(CLOCK_THREAD_CPUTIME_ID) - cpu_start_ms_ : 0; }

 private:
  bool on_;
  at::Device device_;
  std::chrono::steady_clock::time_point start_;
  double cpu_start_ms_ = 0;
};

void add_solve_time(AttentionStatistics& statistics, const Stopwatch& watch) {
  statistics.solve_ms += watch.ms();
  statistics.solve_cpu_ms += watch.cpu_ms();
}

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

LowRankController::LowRankController(std::shared_ptr<RankPolicy> policy, Geometry geometry,
                                     BasisOptions bases, int64_t first_group, GuardOptions guard,
                                     Group context, Group kv)
    : policy_(std::move(policy)),
      geometry_(geometry),
      bases_(std::move(bases)),
      first_group_(first_group),
      guard_(std::move(guard)),
      context_(std::move(context)),
      shared_(std::move(kv)),
      first_eps_(guard_.eps) {
  TORCH_CHECK(
      guard_.eps == 0 || (guard_.eps > 0 && bases_.start.defined() && !guard_.buckets.empty()),
      "LowRankController: a guard of eps ", guard_.eps, " needs starting bases and buckets");
  TORCH_CHECK(bases_.update_steps >= BasisOptions::kSolve, "LowRankController: update_steps ",
              bases_.update_steps, ", expected at least -1");
  check(ErrorKind::kUsage,
        context_.size() == 1 ||
            !(policy_->needs_spectra() || !policy_->state_ranks().empty() || guard_.eps > 0),
        "a sequence split over ", context_.size(),
        " processes takes neither a guard nor a policy that looks at Grams, as ", describe(),
        " does");
}

at::Tensor LowRankController::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                     const at::Tensor& v, const at::Tensor& w_o,
                                     std::shared_ptr<LayerPlan>& plan) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.size(1) > 0 && q.size(1) % k.size(1) == 0 &&
                  v.sizes() == k.sizes() &&
                  k.sizes() == at::IntArrayRef({q.size(0), k.size(1), q.size(2), q.size(3)}),
              "attend: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
              ", expected [B, H, L, d] and twice [B, G, L, d] with H a multiple of G");
  TORCH_CHECK(w_o.dim() == 2 && w_o.size(1) == q.size(1) * q.size(3), "attend: w_o ", w_o.sizes(),
              " for q ", q.sizes(), ", expected [hidden, ", q.size(1) * q.size(3), "]");
  if (const at::Tensor& start = bases_.start; start.defined()) {
    TORCH_CHECK(0 <= layer && layer < start.size(0) && k.size(1) == start.size(1) &&
                    q.size(3) == start.size(3),
                "attend: layer ", layer, " of ", k.size(1), " KV groups and head_dim ", q.size(3),
                ", expected one of the starting bases', ", start.sizes(),
                " (layers, KV groups, 2, head_dim, head_dim)");
  }
  if (plan != nullptr) {  // recomputation: the same ranks and bases, counted once
    const auto out = plan->context != nullptr   ? context_attention(q, k, v, plan->context)
                     : plan->lowrank == nullptr ? exact_attention(q, k, v)
                                                : lowrank_attention(q, k, v, plan->lowrank);
    if (plan->sample != nullptr) {
      sampler_->watch(layer, BlockTree(q.size(2), geometry_), out, q, k, v, w_o, plan->sample);
    }
    return out;
  }
  plan = std::make_shared<LayerPlan>();
  if (context_.size() > 1) {
    return attend_split(layer, q, k, v, w_o, *plan);
  }
  const Stopwatch total(timing_, q.device());
  const int64_t batch = q.size(0), heads = q.size(1), groups = k.size(1), length = q.size(2),
                d = q.size(3);
  const bool with_backward = at::GradMode::is_enabled() && q.requires_grad();
  const double exact_flops = exact_attention_flops(batch, heads, length, d, with_backward);
  statistics_.calls += 1;
  statistics_.exact_flops += exact_flops;

  const BlockTree tree(length, geometry_);
  if (tree.num_pairs() == 0) {
    statistics_.flops += exact_flops;
    const auto out = exact_attention(q, k, v);
    spent(layer, total.ms());
    return out;
  }

  LayerObservation observation{
      layer, batch, shared_.total(heads, q.device()), groups, first_group_, d, tree, {}, {}};
  FarBases bases;
  PairGrams grams;
  UsablePairs usable;
  const auto timed = [&](auto&& make) {
    const Stopwatch watch(timing_, q.device());
    make();
    add_solve_time(statistics_, watch);
  };
  const auto make_grams = [&] {
    grams = shared_.sum(far_grams(q, k, v, tree, /*weighted=*/!ablation_.mass), w_o,
                        statistics_.basis_bytes);
    usable = usable_pairs(grams, w_o);
  };
  const bool grams_first = policy_->needs_spectra() || !policy_->state_ranks().empty() ||
                           (guard_.eps > 0 && !policy_->exact());
  if (grams_first) {
    timed(make_grams);
  }
  std::vector<Ranks> ranks;
  timed([&] { ranks = decide(observation, grams, w_o, bases); });
  const bool low = std::any_of(ranks.begin(), ranks.end(),
                               [&](const Ranks& r) { return r.qk < d || r.v < d; });

  const bool sampled = sampler_ != nullptr && sampler_->draws(layer);
  if (!grams_first && (low || sampled)) {
    timed(make_grams);
  }
  if (sampled) {
    plan->sample = sampler_->choose(layer, tree, grams);
  }
  at::Tensor out;
  double flops = exact_flops + bases.flops;
  if (low) {
    timed([&] {
      if (!policy_->needs_spectra()) {
        at::Tensor start;
        const double spent = bases.flops;
        bases = make_bases(layer, grams, w_o, ranks, start);
        bases.flops += spent;
      }
      plan->lowrank = make_plan(tree, std::move(ranks), grams, bases);
      count_exact(leave_exact(grams, usable, observation.heads / groups, key_counts(tree),
                              plan->lowrank->residual, plan->lowrank->ranks));
      if (ablation_.residual) {
        plan->lowrank->residual = at::Tensor();
      }
    });
    grams = {};  // not needed any more: gone before the operator needs memory
    out = lowrank_attention(q, k, v, plan->lowrank);
    flops = lowrank_attention_flops(*plan->lowrank, batch, heads, groups, d, bases.flops,
                                    with_backward)
                .total();
  } else {
    out = exact_attention(q, k, v);
  }
  statistics_.flops += flops;
  statistics_.solves += bases.solves;
  statistics_.updates += bases.updates;
  spent(layer, total.ms());
  if (sampled) {
    sampler_->watch(layer, tree, out, q, k, v, w_o, plan->sample);
  }
  return out;
}

void LowRankController::count_exact(int64_t pairs) {
  statistics_.exact_pairs += shared_.group().rank() == 0 ? pairs : 0;
}

void LowRankController::spent(int64_t layer, double ms) {
  statistics_.attention_ms += ms;
  if (timing_) {
    statistics_.layer_ms.resize(
        std::max(statistics_.layer_ms.size(), static_cast<size_t>(layer) + 1), 0.0);
    statistics_.layer_ms[static_cast<size_t>(layer)] += ms;
  }
}

at::Tensor LowRankController::split(int64_t length) {
  // What travels depends on the ranks: processes that decide otherwise would wait for messages that
  // nobody sends.
  if (context_.size() > 1 || shared_.shared()) {
    const uint64_t digest = fold(hash_bytes(describe()), decisions_digest_);
    check_agreement(context_, digest, "rank decisions");
    check_agreement(shared_.group(), digest, "rank decisions");
  }
  if (context_.size() == 1) {
    return {};
  }
  split_.emplace(BlockTree(length, geometry_), context_.size());
  return split_->positions(context_.rank());
}

at::Tensor LowRankController::attend_split(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                           const at::Tensor& v, const at::Tensor& w_o,
                                           LayerPlan& plan) {
  TORCH_CHECK(split_.has_value(), "attend: a sequence over ", context_.size(),
              " processes, but split() was not called");
  const Stopwatch total(timing_, q.device());
  const int64_t batch = q.size(0), heads = q.size(1), groups = k.size(1), d = q.size(3);
  const bool with_backward = at::GradMode::is_enabled() && q.requires_grad();
  const BlockTree& tree = split_->tree();
  LayerObservation observation{
      layer, batch, shared_.total(heads, q.device()), groups, first_group_, d, tree, {}, {}};
  FarBases bases;
  std::vector<Ranks> ranks = decide(observation, {}, w_o, bases);
  check(ErrorKind::kUsage,
        std::none_of(ranks.begin(), ranks.end(), [&](const Ranks& r) { return r.gated(d); }),
        "a sequence split over ", context_.size(), " processes takes no gates, as ",
        policy_->describe(), " chose: they need exact keys, which do not travel");
  if (std::any_of(ranks.begin(), ranks.end(),
                  [&](const Ranks& r) { return r.qk < d || r.v < d; })) {
    const Stopwatch watch(timing_, q.device());
    bases = make_split_plan(layer, q, k, v, w_o, ranks, plan);
    add_solve_time(statistics_, watch);
  } else {
    plan.context = c10::make_intrusive<ContextPlan>(*split_, context_,
                                                    context_parts(*split_, ranks, d));
  }
  const auto out = context_attention(q, k, v, plan.context);
  const double members = static_cast<double>(context_.size());  // the split is even
  statistics_.calls += 1;
  statistics_.exact_flops += exact_attention_flops(batch, heads, tree.sequence_length(), d,
                                                   with_backward) /
                             members;
  statistics_.flops += lowrank_attention_flops(LowRankPlan(tree, ranks, {}, {}), batch, heads,
                                               groups, d, 0, with_backward)
                               .total() /
                           members +
                       bases.flops;
  statistics_.solves += bases.solves;
  statistics_.updates += bases.updates;
  statistics_.context_bytes += plan.context->bytes_sent;
  statistics_.context_exact_bytes += plan.context->exact_bytes;
  spent(layer, total.ms());
  return out;
}

FarBases LowRankController::make_split_plan(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& v, const at::Tensor& w_o,
                                            std::vector<Ranks>& ranks, LayerPlan& plan) {
  const int64_t d = q.size(3), sequences = k.size(0) * k.size(1),
                pairs = split_->tree().num_pairs();
  const std::vector<Ranks> decided = ranks;
  const auto makers = basis_makers(*split_, ranks, d);
  const auto made = pairs_made_by(makers, context_.rank());
  PairGrams grams = shared_.sum(
      context_grams(q, k, v, *split_, context_, makers, statistics_.basis_bytes), w_o,
      statistics_.basis_bytes);
  const UsablePairs usable = usable_pairs(grams, w_o);
  FarBases bases;
  at::Tensor start;
  if (starts_from_first_pair(d)) {
    start = dealt_first_pair_bases(grams, w_o, context_, bases.solves, statistics_.basis_bytes);
    bases.flops = static_cast<double>(bases.solves) * basis_solve_flops(d);
  }
  at::Tensor residual;
  if (!made.empty()) {
    std::vector<Ranks> of_made;
    for (int64_t s = 0; s < sequences; ++s) {
      for (const int64_t pair : made) {
        of_made.push_back(ranks[static_cast<size_t>(s * pairs + pair)]);
      }
    }
    std::vector<int64_t> keys;
    for (const int64_t pair : made) {
      keys.push_back(split_->tree().run_of(pair).key_rows);
    }
    const FarBases before = bases;
    bases = make_bases(layer, grams, w_o, of_made, start);
    bases.solves += before.solves;
    residual = residual_of(grams, of_made, keys, bases);
    bases.flops += before.flops;
    leave_exact(grams, usable, shared_.total(q.size(1), q.device()) / k.size(1), keys, residual,
                of_made);
    for (size_t i = 0; i < of_made.size(); ++i) {
      ranks[i / made.size() * static_cast<size_t>(pairs) +
            static_cast<size_t>(made[i % made.size()])] = of_made[i];
    }
  }
  if (q.is_cpu()) {  // where leave_exact may have changed some of them
    agree_on_ranks(ranks, context_, statistics_.basis_bytes);
    int64_t exact = 0;
    for (size_t i = 0; i < ranks.size(); ++i) {
      exact += ranks[i] == decided[i] ? 0 : 1;
    }
    count_exact(exact);
  }
  plan.context = c10::make_intrusive<ContextPlan>(*split_, context_,
                                                  context_parts(*split_, ranks, d));
  hand_out_bases(*plan.context, makers, bases, residual, d, q.options(), statistics_.basis_bytes);
  return bases;
}

void LowRankController::leave_out(Ablation ablation) {
  check(ErrorKind::kUsage, context_.size() == 1, "a sequence split over ", context_.size(),
        " processes can leave nothing out");
  ablation_ = ablation;
}

std::unique_ptr<KvCache> LowRankController::make_cache(int64_t layers, int64_t horizon) const {
  check(ErrorKind::kUsage, !ablation_.residual && !ablation_.mass,
        "a cache of a growing sequence can leave nothing out, this is ", describe());
  check(ErrorKind::kUsage, context_.size() == 1,
        "a cache of a growing sequence cannot be split over ", context_.size(), " processes");
  return policy_->exact() ? AttentionController::make_cache(layers, horizon)
                          : std::make_unique<KvCache>(layers, horizon, geometry_);
}

at::Tensor LowRankController::extend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                     const at::Tensor& v, const at::Tensor& w_o, KvCache& cache) {
  const Stopwatch total(timing_, q.device());
  LayerCache& mine = cache.layer(layer);
  auto out = mine.extend(q, k, v, [&](int64_t level, int64_t pair, const PairGrams& grams) {
    return decide_node(layer, mine, level, pair, grams, w_o);
  });
  statistics_.calls += 1;
  statistics_.attention_ms += total.ms();
  return out;
}

bool LowRankController::starts_from_first_pair(int64_t head_dim) const {
  // A first block of fewer tokens than d has no basis of full rank to start from: what is missing
  // would be rounding.
  return bases_.update_steps != BasisOptions::kSolve && !bases_.start.defined() &&
         geometry_.near_block >= head_dim;
}

FarBases LowRankController::make_bases(int64_t layer, const PairGrams& grams, const at::Tensor& w_o,
                                       const std::vector<Ranks>& ranks, at::Tensor& start) {
  const int64_t batch = grams.keys.size(0), d = grams.keys.size(4);
  const bool solve = bases_.update_steps == BasisOptions::kSolve ||
                     (!bases_.start.defined() && !starts_from_first_pair(d));
  int64_t solves = 0;
  if (!solve && !start.defined() && bases_.start.defined()) {
    start = for_batch(bases_.start[layer], batch);
  } else if (!solve && !start.defined()) {
    start = shared_.first_pair_bases(grams, w_o, solves, statistics_.basis_bytes);
  }
  const auto make = [&](const PairGrams& of, const std::vector<Ranks>& at) {
    const auto any = [&](auto&& low) { return std::any_of(at.begin(), at.end(), low); };
    return solve ? solve_far_bases(of, w_o, any([&](const Ranks& r) { return r.qk < d; }),
                                   any([&](const Ranks& r) { return r.v < d; }))
                 : update_far_bases(of, w_o, at, start, bases_.update_steps);
  };
  FarBases bases = shared_.deal_out(grams, ranks, make, statistics_.basis_bytes);
  bases.solves += solves;
  bases.flops += static_cast<double>(solves) * basis_solve_flops(d);
  return bases;
}

std::vector<Ranks> LowRankController::decide(LayerObservation& observation, const PairGrams& grams,
                                             const at::Tensor& w_o, FarBases& bases) {
  const int64_t d = observation.head_dim;
  if (policy_->needs_spectra()) {
    bases = solve_far_bases(grams, w_o, true, true);
    observation.score_loss = relative_loss(bases.scores.singular_values);
    observation.value_loss = relative_loss(bases.values.singular_values);
  }
  if (const auto of = policy_->state_ranks(); !of.empty()) {
    TORCH_CHECK(bases_.start.defined(), "rank policy '", policy_->describe(),
                "' needs the starting bases of a calibration");
    observation.state = pair_state(grams, w_o, observation.heads / observation.groups,
                                   for_batch(bases_.start[observation.layer], observation.batch),
                                   observation.tree, observation.first_pair, of);
    bases.flops += static_cast<double>(observation.items()) *
                   (start_loss_flops(d) + policy_->flops_per_pair());
  }
  std::vector<Ranks> ranks = policy_->decide(observation);
  TORCH_CHECK(static_cast<int64_t>(ranks.size()) == observation.items(), "rank policy '",
              policy_->describe(), "' returned ", ranks.size(), " decisions for layer ",
              observation.layer, ", expected ", observation.items());
  if (guard_.eps > 0 && !policy_->exact()) {
    raise_to_guard(observation, grams, w_o, ranks, bases);
  }
  if (shared_.group().rank() == 0) {
    for (const Ranks& r : ranks) {
      statistics_.rank_qk += static_cast<double>(r.qk);
      statistics_.rank_v += static_cast<double>(r.v);
    }
    statistics_.decisions += observation.items();
  }
  std::vector<double> decided = {static_cast<double>(observation.layer)};
  for (const Ranks& r : ranks) {
    decided.insert(decided.end(), {static_cast<double>(r.qk), static_cast<double>(r.v), r.gate});
  }
  decisions_digest_ = fold(decisions_digest_,
                           hash_bytes(decided.data(), decided.size() * sizeof(double)));
  return ranks;
}

void LowRankController::raise_to_guard(const LayerObservation& observation, const PairGrams& grams,
                                       const at::Tensor& w_o, std::vector<Ranks>& ranks,
                                       FarBases& bases) {
  const int64_t d = observation.head_dim;
  const StartLoss loss = start_loss(grams, w_o,
                                    for_batch(bases_.start[observation.layer], observation.batch));
  bases.flops += static_cast<double>(observation.items()) * start_loss_flops(d);
  const auto raise_one = [&](const at::Tensor& of_kind, size_t item, int64_t& rank) {
    const double* lost = of_kind.const_data_ptr<double>() + static_cast<int64_t>(item) * (d + 1);
    const int64_t chosen = rank;
    while (rank < d && lost[rank] > guard_.eps * guard_.eps * lost[0]) {
      rank = *std::upper_bound(guard_.buckets.begin(), guard_.buckets.end(), rank);
    }
    statistics_.guard_raises += rank > chosen && shared_.group().rank() == 0 ? 1 : 0;
  };
  const auto scores = loss.scores.contiguous(), values = loss.values.contiguous();
  for (size_t item = 0; item < ranks.size(); ++item) {
    raise_one(scores, item, ranks[item].qk);
    raise_one(values, item, ranks[item].v);
  }
}

NodeFactors LowRankController::decide_node(int64_t layer, LayerCache& cache, int64_t level,
                                           int64_t pair, const PairGrams& of_own_heads,
                                           const at::Tensor& w_o) {
  const BlockTree& horizon = cache.horizon();
  const Stopwatch watch(timing_, w_o.device());
  PairGrams grams = shared_.sum(of_own_heads, w_o, statistics_.basis_bytes);
  const UsablePairs usable = usable_pairs(grams, w_o);
  const int64_t batch = grams.keys.size(0), groups = grams.keys.size(1), d = grams.keys.size(4);
  LayerObservation observation{layer,   batch,        shared_.total(w_o.size(1) / d, w_o.device()),
                               groups,  first_group_, d,
                               horizon, {},           {}};
  observation.first_pair = horizon.pair_index(level, pair);
  observation.pairs = 1;
  FarBases bases;
  NodeFactors factors;
  factors.ranks = decide(observation, grams, w_o, bases);
  for (Ranks& r : factors.ranks) {
    r.gate = Ranks{}.gate;  // a gate needs the exact keys, which a cache at rank r no longer has
  }
  if (!policy_->needs_spectra()) {
    bases = make_bases(layer, grams, w_o, factors.ranks, cache.start());
  }
  const std::vector<int64_t> keys = {horizon.geometry().near_block << level};
  factors.residual = residual_factors(grams, bases.scores, factors.ranks, keys);
  count_exact(leave_exact(grams, usable, observation.heads / groups, keys, factors.residual,
                          factors.ranks));
  statistics_.solves += bases.solves;
  statistics_.updates += bases.updates;
  add_solve_time(statistics_, watch);
  factors.scores = std::move(bases.scores);
  factors.values = std::move(bases.values);
  return factors;
}

std::string LowRankController::describe() const {
  return c10::str(
      "near block ", geometry_.near_block, ", sinks ", geometry_.sink_tokens, ", bases ",
      bases_.update_steps == BasisOptions::kSolve
          ? std::string("solved")
          : c10::str("updated ", bases_.update_steps, " times from ",
                     bases_.start.defined() ? "the calibration" : "the first block"),
      first_eps_ > 0 ? c10::str(", guard ", first_eps_) : std::string(),
      ablation_.residual ? ", without residual factors" : "",
      ablation_.mass ? ", without weights in the Grams" : "", ", ranks: ", policy_->describe());
}

AttentionStatistics LowRankController::take_statistics() {
  return std::exchange(statistics_, {});
}

uint64_t LowRankController::take_decisions_digest() {
  return fold(hash_bytes(describe()), std::exchange(decisions_digest_, 0));
}

}  // namespace drrl
