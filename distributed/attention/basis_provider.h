#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/ATen.h>

#include "core/attention/far_bases.h"
#include "core/linalg/gram.h"
#include "distributed/collectives/group.h"

namespace drrl {

/// Makes the bases of far pairs from their Grams. Implementations differ in who holds the query
/// heads of a KV head: this process alone (LocalBases) or several (ReplicatedKvBases).
class BasisProvider {
 public:
  BasisProvider(BasisOptions options, int64_t near_block)
      : options_(std::move(options)), near_block_(near_block) {}
  virtual ~BasisProvider() = default;

  /// Query heads of this process's KV groups on all processes that hold them, of `own` here.
  /// Collective at the first call.
  virtual int64_t total_heads(int64_t own, const at::Device& device) = 0;

  /// Grams of own query heads, [B, G, pairs, d, d] -> those of all heads, bit-equal on all
  /// processes that hold them. w_o [hidden, H d]. Collective over these.
  virtual PairGrams of_all_heads(const PairGrams& own, const at::Tensor& w_o) = 0;

  /// Bases of the pairs that these Grams (of all heads) belong to, at their ranks [B G pairs], as
  /// the options say. Updates begin at `start` [B G, 2, d, d]; if it is undefined it becomes the
  /// calibration's bases of the layer, or is made from the first of these pairs. The cost is this
  /// process's own. Collective over the processes that hold the heads.
  virtual FarBases make(int64_t layer, const PairGrams& grams, const at::Tensor& w_o,
                        const std::vector<Ranks>& ranks, at::Tensor& start) = 0;

  /// Whether updates begin at bases of the sequence's first pair. A first block of fewer tokens
  /// than d has no basis of full rank: what is missing would be rounding.
  bool starts_from_first_pair(int64_t head_dim) const {
    return options_.update_steps != BasisOptions::kSolve && !options_.start.defined() &&
           near_block_ >= head_dim;
  }

  const BasisOptions& options() const noexcept { return options_; }

 protected:
  /// Whether each pair is decomposed in full.
  bool decomposes(int64_t head_dim) const {
    return options_.update_steps == BasisOptions::kSolve ||
           !(options_.start.defined() || starts_from_first_pair(head_dim));
  }
  /// The calibration's starting bases of a layer, [B G, 2, d, d]; undefined if there are none.
  at::Tensor calibrated_start(int64_t layer, int64_t batch) const {
    return options_.start.defined() ? for_batch(options_.start[layer], batch) : at::Tensor();
  }

 private:
  BasisOptions options_;
  int64_t near_block_;
};

/// This process holds all query heads of its KV groups. Nothing communicates.
class LocalBases final : public BasisProvider {
 public:
  using BasisProvider::BasisProvider;

  int64_t total_heads(int64_t own, const at::Device& /*device*/) override { return own; }
  PairGrams of_all_heads(const PairGrams& own, const at::Tensor& /*w_o*/) override { return own; }
  FarBases make(int64_t layer, const PairGrams& grams, const at::Tensor& w_o,
                const std::vector<Ranks>& ranks, at::Tensor& start) override;
};

/// The provider for KV heads that the members of `kv` (Mesh::kv) share: ReplicatedKvBases if there
/// are several, else LocalBases. near_block: Geometry's.
std::unique_ptr<BasisProvider> make_basis_provider(BasisOptions options, int64_t near_block,
                                                   const Group& kv);

}  // namespace drrl
