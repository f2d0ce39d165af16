#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include <ATen/ATen.h>

#include "core/attention/far_bases.h"
#include "core/types/attention_call.h"
#include "distributed/collectives/group.h"
#include "policy/attention/attention_statistics.h"
#include "policy/attention/layer_plan.h"
#include "policy/attention/rank_decider.h"

namespace drrl {

/// Wall and processor time since it was made. On CUDA it waits for the device at both ends.
class Stopwatch {
 public:
  /// Off: takes no time, and waits for nothing.
  Stopwatch(bool on, const at::Device& device);
  double ms() const;
  double cpu_ms() const;  ///< of the calling thread

 private:
  bool on_;
  at::Device device_;
  std::chrono::steady_clock::time_point start_;
  double cpu_start_ms_ = 0;
};

/// Sums up what attention costs (AttentionStatistics).
class AttentionRecorder {
 public:
  /// context: processes that share the sequences; kv: those that share this one's KV head, of which
  /// only the first counts decisions.
  AttentionRecorder(Group context, Group kv) : context_(std::move(context)), kv_(std::move(kv)) {}

  /// Times are taken only while this is on.
  void set_timing(bool on) { timing_ = on; }
  Stopwatch stopwatch(const at::Device& device) const { return {timing_, device}; }

  /// Runs `make`, which makes or gathers bases. Counts its time and the bytes that it sends.
  template <typename Make>
  void record_bases(const at::Device& device, Make&& make) {
    const Stopwatch watch = stopwatch(device);
    const int64_t before = context_.sent_bytes() + kv_.sent_bytes();
    make();
    statistics_.basis_bytes += context_.sent_bytes() + kv_.sent_bytes() - before;
    statistics_.basis_ms += watch.ms();
    statistics_.basis_cpu_ms += watch.cpu_ms();
  }

  void count(const RankDecision& decision);
  void count(const FarBases& bases);

  /// Counts a call that ran by `plan`, whose ranks and bases are these. sent_bytes: by the
  /// operator.
  void count(const AttentionCall& call, const LayerPlan& plan, const std::vector<Ranks>& ranks,
             double basis_flops, int64_t sent_bytes);

  /// Time of a call of `attend`, and of `extend`, which has no layers apart.
  void add_time(int64_t layer, double ms);
  void count_extension(double ms);

  /// What was spent since the last call.
  AttentionStatistics take();

 private:
  Group context_, kv_;
  bool timing_ = false;
  AttentionStatistics statistics_;
};

}  // namespace drrl
