#pragma once

#include <cstdint>
#include <vector>

#include <ATen/ATen.h>

#include "distributed/attention/basis_provider.h"

namespace drrl {

/// Bases of a KV head that several tensor-parallel processes hold, each with some of its query
/// heads (Mesh::kv). Its Grams are sums over all of these heads. Each pair's bases are made by one
/// of the processes and gathered by all: equal bit for bit, and each pair is worked on once.
class ReplicatedKvBases final : public BasisProvider {
 public:
  ReplicatedKvBases(BasisOptions options, int64_t near_block, Group kv)
      : BasisProvider(options, near_block),
        local_(std::move(options), near_block),
        group_(std::move(kv)) {}

  int64_t total_heads(int64_t own, const at::Device& device) override;

  /// One all-reduce of the Grams' lower triangles, in the type that travelling_type says; `output`
  /// is among them. Weights of keys and values are means over heads, so each process counts by its
  /// number of heads. own [B, 1, pairs, d, d].
  PairGrams of_all_heads(const PairGrams& own, const at::Tensor& w_o) override;

  /// One all-gather of the bases, and one of the starting bases where they are made of the first
  /// pair.
  FarBases make(int64_t layer, const PairGrams& grams, const at::Tensor& w_o,
                const std::vector<Ranks>& ranks, at::Tensor& start) override;

 private:
  /// first_pair_bases, each of the 2 B problems solved by one process. decompositions += this
  /// process's.
  at::Tensor shared_first_pair_bases(const PairGrams& grams, const at::Tensor& w_o,
                                     int64_t& decompositions) const;
  /// The bases of all pairs [0, pairs), of which this process made its share.
  void gather(FarBases& made, const std::vector<Ranks>& ranks, int64_t batch, int64_t pairs,
              const at::TensorOptions& options, int64_t head_dim) const;
  /// Rows [count, ..] of which this process has the share partition(count, size, rank) -> all.
  at::Tensor all_rows(const at::Tensor& own, int64_t count) const;

  LocalBases local_;
  Group group_;
  int64_t total_heads_ = 0;
};

}  // namespace drrl
