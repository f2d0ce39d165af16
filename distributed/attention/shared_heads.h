#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <ATen/ATen.h>

#include "core/attention/far_bases.h"
#include "core/linalg/gram.h"
#include "distributed/collectives/group.h"

namespace drrl {

/// Bases of a KV head that several tensor-parallel processes hold, each with some of its query
/// heads (Mesh::kv). Its Grams are sums over all of these heads; each pair's bases are made by one
/// of the processes and handed to all: equal bit for bit, and each pair is worked on once.
class SharedHeads {
 public:
  SharedHeads() = default;  ///< nobody shares: nothing below communicates
  explicit SharedHeads(Group group) : group_(std::move(group)) {}

  const Group& group() const noexcept { return group_; }
  bool shared() const noexcept { return group_.size() > 1; }

  /// Query heads on all of these processes, of `own` here. Collective at the first call.
  int64_t total(int64_t own, const at::Device& device);

  /// Grams of own heads, [B, 1, pairs, d, d], and w_o [hidden, H d] -> those of all heads, `output`
  /// among them, bit-equal on all processes. One all-reduce of the lower triangles, as
  /// travelling_type says. Keys' and values' weights are means over heads, so they count by heads.
  /// bytes += what left this process. Collective.
  PairGrams sum(const PairGrams& own, const at::Tensor& w_o, int64_t& bytes);

  /// first_pair_bases of such Grams, each of the 2 B problems solved by one process and gathered;
  /// solves += those of this one, bytes as above. Collective.
  at::Tensor first_pair_bases(const PairGrams& grams, const at::Tensor& w_o, int64_t& solves,
                              int64_t& bytes) const;

  /// What `make` makes of pairs' Grams at their ranks (as FarBases, for a batch of one KV group),
  /// each process for its share of the pairs, put together for all of them on all processes by one
  /// all-gather; solves, updates and operations are this process' own. bytes as above. Collective.
  FarBases deal_out(
      const PairGrams& grams, const std::vector<Ranks>& ranks,
      const std::function<FarBases(const PairGrams&, const std::vector<Ranks>&)>& make,
      int64_t& bytes) const;

 private:
  /// Rows [count, ..] of which this process has the share partition(count, size, rank) -> all of
  /// them.
  at::Tensor gathered(const at::Tensor& own, int64_t count, int64_t& bytes) const;

  Group group_;
  int64_t total_ = 0;
};

}  // namespace drrl
