#pragma once

#include <cstdint>
#include <vector>

namespace drrl {

/// What attention cost, as sums over layers and calls of one process, so that figures of several
/// steps and ranks add up.
struct AttentionStatistics {
  int64_t calls = 0;
  double flops = 0;        ///< everything counted: near, sinks, far, projections, Grams, bases
  double exact_flops = 0;  ///< of exact causal attention on the same shapes
  std::vector<double> layer_ms;  ///< attention_ms by layer, of attend(); empty unless timing is on
  double attention_ms = 0;  ///< forward calls of attend(), bases included; 0 unless timing is on
  double basis_ms = 0;      ///< Grams and bases, under context parallelism or with a shared KV head
                            ///< with their exchange; 0 unless timing is on
  double basis_cpu_ms = 0;  ///< processor time of the calling thread in basis_ms: no wait for
                            ///< another process or for a core. Says nothing about CUDA
  int64_t decompositions = 0;      ///< full ones, of d x d basis problems
  int64_t updates = 0;             ///< rounds of incremental basis updates
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

  AttentionStatistics& operator+=(const AttentionStatistics& other);

  /// All sums but times, in a fixed order, so that processes can add them up in one message; and
  /// back. Exact for counts up to 2^53.
  std::vector<double> counts() const;
  void set_counts(const std::vector<double>& counts);

  /// Mean rank over decisions; head_dim if there were none.
  double mean_rank_qk(int64_t head_dim) const { return mean_rank(rank_qk, head_dim); }
  double mean_rank_v(int64_t head_dim) const { return mean_rank(rank_v, head_dim); }

 private:
  double mean_rank(double sum, int64_t head_dim) const {
    return static_cast<double>(decisions > 0 ? sum / static_cast<double>(decisions)
                                             : static_cast<double>(head_dim));
  }
};

}  // namespace drrl
