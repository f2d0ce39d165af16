#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace drrl {

/// What attention cost, as sums over layers and calls of one process, so that figures of several
/// steps and ranks add up.
struct AttentionStatistics {
  int64_t calls = 0;
  double flops = 0;  ///< spent, everything counted: near, sinks, far, projections, Grams, solves
  double exact_flops = 0;        ///< of exact causal attention on the same shapes
  std::vector<double> layer_ms;  ///< attention_ms by layer, of attend(); empty unless timing is on
  double attention_ms = 0;  ///< forward calls of attend(), solves included; 0 unless timing is on
  double solve_ms = 0;      ///< Grams and bases, under context parallelism or with a shared KV head
                            ///< with their exchange; 0 unless timing is on
  double solve_cpu_ms = 0;  ///< processor time of the calling thread in solve_ms: no wait for
                            ///< another process or for a core. Says nothing about CUDA
  int64_t solves = 0;       ///< full decompositions of d x d basis problems
  int64_t updates = 0;      ///< rounds of incremental basis updates
  double rank_qk = 0, rank_v = 0;  ///< sums over decisions
  int64_t guard_raises = 0;        ///< decisions for scores or values that the guard raised
  int64_t exact_pairs = 0;    ///< (sequence, KV group, pair) that no low rank serves, with exact
                              ///< scores or values whatever was decided (leave_exact)
  int64_t context_bytes = 0;  ///< of keys and values that left this process in forward passes under
                              ///< context parallelism
  int64_t context_exact_bytes = 0;  ///< the same at rank d
  int64_t basis_bytes = 0;  ///< of Grams and bases that left it, to processes that share its
                            ///< sequences or its KV head
  int64_t decisions = 0;  ///< (sequence, KV group, pair) decisions; exact layers without far pairs
                          ///< make none. Like raises and ranks, of a KV head that processes share
                          ///< on the first of them alone

  AttentionStatistics& operator+=(const AttentionStatistics& other) {
    calls += other.calls;
    flops += other.flops;
    exact_flops += other.exact_flops;
    attention_ms += other.attention_ms;
    layer_ms.resize(std::max(layer_ms.size(), other.layer_ms.size()), 0.0);
    std::transform(other.layer_ms.begin(), other.layer_ms.end(), layer_ms.begin(), layer_ms.begin(),
                   std::plus<>());
    solve_ms += other.solve_ms;
    solve_cpu_ms += other.solve_cpu_ms;
    solves += other.solves;
    updates += other.updates;
    rank_qk += other.rank_qk;
    rank_v += other.rank_v;
    guard_raises += other.guard_raises;
    exact_pairs += other.exact_pairs;
    context_bytes += other.context_bytes;
    context_exact_bytes += other.context_exact_bytes;
    basis_bytes += other.basis_bytes;
    decisions += other.decisions;
    return *this;
  }
};

}  // namespace drrl
