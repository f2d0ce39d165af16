#include "policy/attention/lowrank_controller.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "distributed/attention/context_parallel_bases.h"
#include "distributed/collectives/agreement.h"

namespace drrl {

LowRankController::LowRankController(std::shared_ptr<RankPolicy> policy, Geometry geometry,
                                     BasisOptions bases, int64_t first_group, GuardOptions guard,
                                     Group context, Group kv)
    : geometry_(geometry),
      first_group_(first_group),
      context_(std::move(context)),
      kv_(std::move(kv)),
      provider_(make_basis_provider(bases, geometry.near_block, kv_)),
      decider_(std::move(policy), std::move(guard), bases.start),
      recorder_(context_, kv_) {
  TORCH_CHECK(bases.update_steps >= BasisOptions::kSolve, "LowRankController: update_steps ",
              bases.update_steps, ", expected at least -1");
  check(ErrorKind::kUsage,
        context_.size() == 1 || !(decider_.needs_grams() || decider_.first_guard_eps() > 0),
        "a sequence split over ", context_.size(),
        " processes takes neither a guard nor a policy that looks at Grams, as ", describe(),
        " does");
}

at::Tensor LowRankController::split(int64_t length) {
  // What travels depends on the ranks: processes that decide otherwise would wait for messages that
  // nobody sends.
  if (context_.size() > 1 || kv_.size() > 1) {
    const uint64_t digest = decider_.digest(describe());
    check_agreement(context_, digest, "rank decisions");
    check_agreement(kv_, digest, "rank decisions");
  }
  if (context_.size() == 1) {
    return {};
  }
  split_.emplace(BlockTree(length, geometry_), context_.size());
  return split_->positions(context_.rank());
}

at::Tensor LowRankController::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                     const at::Tensor& v, const at::Tensor& w_o,
                                     std::shared_ptr<LayerPlan>& plan) {
  const AttentionCall call{layer, q, k, v, w_o};
  check_call(call);
  at::Tensor out;
  if (plan != nullptr) {  // recomputation: the same ranks and bases, counted once
    out = plan->run(q, k, v);
  } else {
    plan = std::make_shared<LayerPlan>();
    const Stopwatch watch = recorder_.stopwatch(q.device());
    const Planned planned = context_.size() > 1 ? plan_split_layer(call, *plan)
                                                : plan_layer(call, *plan);
    const int64_t before = context_.sent_bytes();
    out = plan->run(q, k, v, &plan->served);
    recorder_.count(call, *plan, planned.ranks, planned.flops, context_.sent_bytes() - before);
    recorder_.add_time(layer, watch.ms());
  }
  if (plan->sample != nullptr) {
    sampler_->watch(layer, BlockTree(call.length(), geometry_), out, q, k, v, w_o, plan->sample);
  }
  return out;
}

void LowRankController::check_call(const AttentionCall& call) const {
  const at::Tensor &q = call.q, &k = call.k, &v = call.v, &w_o = call.w_o;
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.size(1) > 0 && q.size(1) % k.size(1) == 0 &&
                  v.sizes() == k.sizes() &&
                  k.sizes() == at::IntArrayRef({q.size(0), k.size(1), q.size(2), q.size(3)}),
              "attend: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
              ", expected [B, H, L, d] and twice [B, G, L, d] with H a multiple of G");
  TORCH_CHECK(w_o.dim() == 2 && w_o.size(1) == q.size(1) * q.size(3), "attend: w_o ", w_o.sizes(),
              " for q ", q.sizes(), ", expected [hidden, ", q.size(1) * q.size(3), "]");
  if (const at::Tensor& start = bases().start; start.defined()) {
    TORCH_CHECK(0 <= call.layer && call.layer < start.size(0) && k.size(1) == start.size(1) &&
                    q.size(3) == start.size(3),
                "attend: layer ", call.layer, " of ", k.size(1), " KV groups and head_dim ",
                q.size(3), ", expected one of the starting bases', ", start.sizes(),
                " (layers, KV groups, 2, head_dim, head_dim)");
  }
  TORCH_CHECK(context_.size() == 1 || split_.has_value(), "attend: a sequence over ",
              context_.size(), " processes, but split() was not called");
}

LowRankController::Planned LowRankController::plan_layer(const AttentionCall& call,
                                                         LayerPlan& plan) {
  const BlockTree tree(call.length(), geometry_);
  if (tree.num_pairs() == 0) {
    return {};
  }
  const int64_t d = call.head_dim();
  const at::Device device = call.q.device();
  LayerObservation observation{
      .layer = call.layer,
      .batch = call.batch(),
      .heads = provider_->total_heads(call.heads(), device),
      .groups = call.groups(),
      .first_group = first_group_,
      .head_dim = d,
      .tree = tree,
  };
  PairGrams grams;
  UsablePairs usable;
  const auto make_grams = [&] {
    grams = provider_->of_all_heads(
        far_grams(call.q, call.k, call.v, tree, /*weighted=*/!ablation_.mass), call.w_o);
    usable = usable_pairs(grams, call.w_o);
  };
  const bool grams_first = decider_.needs_grams();
  if (grams_first) {
    recorder_.record_bases(device, make_grams);
  }
  RankDecision decision;
  recorder_.record_bases(device, [&] { decision = decide(observation, grams, call.w_o); });
  std::vector<Ranks>& ranks = decision.ranks;
  const bool low = std::any_of(ranks.begin(), ranks.end(),
                               [&](const Ranks& r) { return r.qk < d || r.v < d || r.drops(); });
  const bool sampled = sampler_ != nullptr && sampler_->draws(call.layer);
  if (!grams_first && (low || sampled)) {
    recorder_.record_bases(device, make_grams);
  }
  if (sampled) {
    plan.sample = sampler_->choose(call.layer, tree, grams);
  }
  FarBases& bases = decision.bases;
  if (low) {
    recorder_.record_bases(device, [&] {
      if (!policy()->needs_spectra()) {
        const double decision_flops = bases.flops;
        at::Tensor start;
        bases = provider_->make(call.layer, grams, call.w_o, ranks, start);
        bases.flops += decision_flops;
      }
      complete_bases(bases, grams, usable, observation.heads / observation.groups, key_counts(tree),
                     ranks);
      plan.lowrank = c10::make_intrusive<LowRankPlan>(
          tree, ranks, bases.scores, bases.values,
          ablation_.residual ? at::Tensor() : bases.residual);
    });
  }
  recorder_.count(bases);
  return {.flops = bases.flops};
}

LowRankController::Planned LowRankController::plan_split_layer(const AttentionCall& call,
                                                               LayerPlan& plan) {
  const int64_t d = call.head_dim();
  const at::Device device = call.q.device();
  LayerObservation observation{
      .layer = call.layer,
      .batch = call.batch(),
      .heads = provider_->total_heads(call.heads(), device),
      .groups = call.groups(),
      .first_group = first_group_,
      .head_dim = d,
      .tree = split_->tree(),
  };
  RankDecision decision = decide(observation, {}, call.w_o);
  check(ErrorKind::kUsage,
        std::none_of(decision.ranks.begin(), decision.ranks.end(),
                     [&](const Ranks& r) { return r.gated(d) || r.drops(); }),
        "a sequence split over ", context_.size(),
        " processes takes no gates and drops no tiles, as ", policy()->describe(), " chose");
  PlannedContext planned;
  recorder_.record_bases(device, [&] {
    planned = make_context_plan(call, *split_, context_, *provider_, std::move(decision.ranks));
  });
  recorder_.count(planned.bases);
  plan.context = std::move(planned.plan);
  return {.ranks = std::move(planned.ranks), .flops = planned.bases.flops};
}

RankDecision LowRankController::decide(LayerObservation& observation, const PairGrams& grams,
                                       const at::Tensor& w_o) {
  RankDecision decision = decider_.decide(observation, grams, w_o);
  recorder_.count(decision);
  return decision;
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
  return policy()->exact() ? AttentionController::make_cache(layers, horizon)
                           : std::make_unique<KvCache>(layers, horizon, geometry_);
}

at::Tensor LowRankController::extend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                     const at::Tensor& v, const at::Tensor& w_o, KvCache& cache) {
  const Stopwatch watch = recorder_.stopwatch(q.device());
  LayerCache& mine = cache.layer(layer);
  auto out = mine.extend(q, k, v, [&](int64_t level, int64_t pair, const PairGrams& grams) {
    return decide_node(layer, mine, level, pair, grams, w_o);
  });
  recorder_.count_extension(watch.ms());
  return out;
}

NodeFactors LowRankController::decide_node(int64_t layer, LayerCache& cache, int64_t level,
                                           int64_t pair, const PairGrams& of_own_heads,
                                           const at::Tensor& w_o) {
  const BlockTree& horizon = cache.horizon();
  const int64_t d = of_own_heads.keys.size(4), groups = of_own_heads.keys.size(1);
  LayerObservation observation{
      .layer = layer,
      .batch = of_own_heads.keys.size(0),
      .heads = provider_->total_heads(w_o.size(1) / d, w_o.device()),
      .groups = groups,
      .first_group = first_group_,
      .head_dim = d,
      .tree = horizon,
      .first_pair = horizon.pair_index(level, pair),
      .pairs = 1,
  };
  NodeFactors factors;
  recorder_.record_bases(w_o.device(), [&] {
    PairGrams grams = provider_->of_all_heads(of_own_heads, w_o);
    const UsablePairs usable = usable_pairs(grams, w_o);
    RankDecision decision = decide(observation, grams, w_o);
    for (Ranks& r : decision.ranks) {
      r.gate = Ranks{}.gate;  // a gate needs the exact keys, which a cache at rank r no longer has
      r.drop = 0;             // tiles of rows are not known token by token
    }
    FarBases bases = policy()->needs_spectra()
                         ? std::move(decision.bases)
                         : provider_->make(layer, grams, w_o, decision.ranks, cache.start());
    complete_bases(bases, grams, usable, observation.heads / groups,
                   {horizon.geometry().near_block << level}, decision.ranks);
    recorder_.count(bases);
    factors.ranks = std::move(decision.ranks);
    factors.scores = std::move(bases.scores);
    factors.values = std::move(bases.values);
    factors.residual = std::move(bases.residual);
  });
  return factors;
}

std::string LowRankController::describe() const {
  const BasisOptions& options = bases();
  const double eps = decider_.first_guard_eps();
  return c10::str(
      "near block ", geometry_.near_block, ", sinks ", geometry_.sink_tokens, ", bases ",
      options.update_steps == BasisOptions::kSolve
          ? std::string("solved")
          : c10::str("updated ", options.update_steps, " times from ",
                     options.start.defined() ? "the calibration" : "the first block"),
      eps > 0 ? c10::str(", guard ", eps) : std::string(),
      ablation_.residual ? ", without residual factors" : "",
      ablation_.mass ? ", without weights in the Grams" : "", ", ranks: ", policy()->describe());
}

}  // namespace drrl
