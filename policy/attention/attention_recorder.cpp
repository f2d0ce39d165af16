#include "policy/attention/attention_recorder.h"

#include <algorithm>
#include <utility>

#include "core/attention/flops.h"
#include "core/cpu_clock.h"
#include "core/device.h"

namespace drrl {

Stopwatch::Stopwatch(bool on, const at::Device& device) : on_(on), device_(device) {
  if (on_) {
    synchronize(device_);
    start_ = std::chrono::steady_clock::now();
    cpu_start_ms_ = drrl::cpu_ms(CLOCK_THREAD_CPUTIME_ID);
  }
}

double Stopwatch::ms() const {
  if (!on_) {
    return 0;
  }
  synchronize(device_);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_)
      .count();
}

double Stopwatch::cpu_ms() const {
  return on_ ? drrl::cpu_ms(CLOCK_THREAD_CPUTIME_ID) - cpu_start_ms_ : 0;
}

void AttentionRecorder::count(const RankDecision& decision) {
  if (kv_.rank() != 0) {
    return;
  }
  for (const Ranks& r : decision.ranks) {
    statistics_.rank_qk += static_cast<double>(r.qk);
    statistics_.rank_v += static_cast<double>(r.v);
  }
  statistics_.decisions += static_cast<int64_t>(decision.ranks.size());
  statistics_.guard_raises += decision.guard_raises;
}

void AttentionRecorder::count(const FarBases& bases) {
  statistics_.decompositions += bases.decompositions;
  statistics_.updates += bases.updates;
  statistics_.exact_pairs += kv_.rank() == 0 ? bases.exact_pairs : 0;
}

void AttentionRecorder::count(const AttentionCall& call, const LayerPlan& plan,
                              const std::vector<Ranks>& ranks, double basis_flops,
                              int64_t sent_bytes) {
  const int64_t batch = call.batch(), heads = call.heads(), groups = call.groups(),
                d = call.head_dim();
  const bool with_backward = call.with_backward();
  statistics_.calls += 1;
  if (plan.context != nullptr) {
    const BlockTree& tree = plan.context->split.tree();
    const double members = static_cast<double>(context_.size());  // the split is even
    statistics_.exact_flops += exact_attention_flops(batch, heads, tree.sequence_length(), d,
                                                     with_backward) /
                               members;
    statistics_.flops += lowrank_attention_flops(LowRankPlan(tree, ranks, {}, {}), batch, heads,
                                                 groups, d, 0, with_backward)
                                 .total() /
                             members +
                         basis_flops;
    statistics_.context_bytes += sent_bytes;
    statistics_.context_exact_bytes += plan.context->exact_elements(d) * call.q.element_size();
    return;
  }
  const double exact = exact_attention_flops(batch, heads, call.length(), d, with_backward);
  statistics_.exact_flops += exact;
  statistics_.flops += plan.lowrank == nullptr
                           ? exact + basis_flops
                           : lowrank_attention_flops(*plan.lowrank, batch, heads, groups, d,
                                                     basis_flops, with_backward, plan.served)
                                 .total();
}

void AttentionRecorder::add_time(int64_t layer, double ms) {
  statistics_.attention_ms += ms;
  if (timing_) {
    statistics_.layer_ms.resize(
        std::max(statistics_.layer_ms.size(), static_cast<size_t>(layer) + 1), 0.0);
    statistics_.layer_ms[static_cast<size_t>(layer)] += ms;
  }
}

void AttentionRecorder::count_extension(double ms) {
  statistics_.calls += 1;
  statistics_.attention_ms += ms;
}

AttentionStatistics AttentionRecorder::take() {
  return std::exchange(statistics_, {});
}

}  // namespace drrl
