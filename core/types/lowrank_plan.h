#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/custom_class.h>

#include "core/types/basis.h"
#include "core/types/block_tree.h"
#include "core/types/ranks.h"

namespace drrl {

/// Entries that gates made exact, of all rows: row i of [B, H, L] has keys[begin[i]], ..,
/// keys[begin[i + 1] - 1], token positions, ascending.
class ExactEntries {
 public:
  ExactEntries() = default;
  ExactEntries(at::Tensor begin, at::Tensor keys)
      : begin_(std::move(begin)), keys_(std::move(keys)) {}
  /// Of places [n] int64, row x length + key, in any order on any device; sorted, and brought to
  /// the CPU, when somebody first asks which they are.
  ExactEntries(at::Tensor places, int64_t rows, int64_t length)
      : places_(std::move(places)), rows_(rows), length_(length) {}

  bool defined() const { return begin_.defined() || places_.defined(); }
  int64_t size() const {
    return places_.defined() ? places_.numel() : keys_.defined() ? keys_.numel() : 0;
  }
  const at::Tensor& begin() const;  ///< [B H L + 1] int64, on the CPU
  const at::Tensor& keys() const;   ///< int32, on the CPU
  /// How many entries of rows [row, row + rows) of [B H L] are of a key in [key, key + key_count).
  int64_t count(int64_t row, int64_t rows, int64_t key, int64_t key_count) const;

 private:
  void sort() const;

  mutable at::Tensor begin_, keys_, places_;
  int64_t rows_ = 0, length_ = 0;
};

/// All that one layer's low-rank attention needs besides q, k and v. Constant for autograd.
struct LowRankPlan : torch::CustomClassHolder {
  LowRankPlan(BlockTree tree_in, std::vector<Ranks> ranks_in, Basis scores_in, Basis values_in,
              at::Tensor residual_in = {})
      : tree(std::move(tree_in)),
        ranks(std::move(ranks_in)),
        scores(std::move(scores_in)),
        values(std::move(values_in)),
        residual(std::move(residual_in)) {}

  BlockTree tree;
  /// One entry per (batch, KV group, pair), in that order, pair innermost: B G pairs entries.
  std::vector<Ranks> ranks;
  /// Bases in the same order, [B G pairs, d, columns] with at least as many columns as the largest
  /// rank below d. `scores` may be undefined if every rank qk is d, `values` if every rank v is d.
  Basis scores;
  Basis values;
  /// residual_factor of each pair's score basis at its rank, [B G pairs, d, m] float32, not read
  /// where the rank is d; undefined: no correction.
  at::Tensor residual;

  bool drops() const {
    return std::any_of(ranks.begin(), ranks.end(), [](const Ranks& r) { return r.drops(); });
  }
  bool gated(int64_t d) const {
    return std::any_of(ranks.begin(), ranks.end(), [&](const Ranks& r) { return r.gated(d); });
  }
};

struct RunCalls;  // lowrank_attention.cpp

/// What of the far field a pass served otherwise than at low rank.
struct FarServed {
  ExactEntries exact;  ///< what gates made exact
  /// First row of each tile that keeps it, kTileRows if none does: [B, H, tiles of rows, tiles of
  /// keys] uint8, kNoTile where no pair drops. Undefined unless a pair drops.
  at::Tensor kept_from;

  static constexpr uint8_t kNoTile = 255;
};

/// What a forward pass found out, for its backward pass.
struct LowRankContext : torch::CustomClassHolder {
  FarServed served;
  /// Of the composed operator: the same, each matrix of scores by flat int32 indices.
  std::vector<at::Tensor> exact_slices;
  std::vector<at::Tensor> kept_slices;  ///< likewise of tiles, [n, rows, tiles of keys] bool
  /// Likewise: how the plan's pairs share calls, and what those need of the bases.
  std::shared_ptr<const std::vector<RunCalls>> calls;
};

}  // namespace drrl
