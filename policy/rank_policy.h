#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <string>
#include <vector>

#include "core/block_tree.h"
#include "core/lowrank_attention.h"

namespace drrl {

class Calibration;

/// The ranks that a device runs without waste, ascending, the last one `head_dim` itself (exact): multiples of 16 on a CPU; 32, 64, 96, 128 on
/// CUDA, whose flash kernels pad to those. Head dims below 64 (test models) are cut into four steps.
std::vector<int64_t> rank_buckets(const at::Device& device, int64_t head_dim);

/// What a policy may look at when it chooses the ranks of one layer: nothing but the past of every pair's queries.
struct LayerObservation {
  int64_t layer;
  int64_t batch;
  int64_t groups;  ///< KV groups on this rank
  int64_t head_dim;
  const BlockTree& tree;
  /// Share of the energy ||X Y^T||_F^2 that is lost at rank r, column r of [B G pairs, d + 1] float64, from each pair's own spectrum: of the scores
  /// and of the values as W_O sees them. Defined only if the policy `needs_spectra()`.
  at::Tensor score_loss;
  at::Tensor value_loss;
};

/// Chooses the ranks of every far pair of a layer: one entry per (batch, KV group, pair), pair innermost. Deterministic.
class RankPolicy {
 public:
  virtual ~RankPolicy() = default;
  virtual std::vector<Ranks> decide(const LayerObservation& observation) = 0;
  virtual bool needs_spectra() const { return false; }
  /// Whether every rank is the head dim, whatever the layer.
  virtual bool exact() const { return false; }
  /// One line for banners and for comparing runs: the name and whatever shapes the decisions.
  virtual std::string describe() const = 0;
};

/// Every rank is the head dim: exact attention.
std::unique_ptr<RankPolicy> make_full_policy();

/// The same rank everywhere. Errors: Error(kUsage) unless 1 <= rank <= head_dim.
std::unique_ptr<RankPolicy> make_fixed_policy(int64_t rank, int64_t head_dim);

/// Per pair the smallest bucket that keeps the share `energy` of the spectrum, for scores and values apart ("adaptive SVD" in the paper's
/// comparison). Errors: Error(kUsage) unless 0 < energy <= 1.
std::unique_ptr<RankPolicy> make_energy_policy(double energy, std::vector<int64_t> buckets);

/// Per layer and kind the ranks that do the least calibrated damage at a mean (r + r_v) / 2d of at most `budget`: `allocate()`.
/// Errors: Error(kUsage) unless 0 < budget <= 1 and the calibration fits the model's layers, head dim and buckets.
std::unique_ptr<RankPolicy> make_dp_policy(const Calibration& calibration, double budget, int64_t layers, int64_t head_dim,
                                           const std::vector<int64_t>& buckets);

}  // namespace drrl
