#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <string>
#include <vector>

#include "core/block_tree.h"
#include "core/lowrank_attention.h"
#include "policy/attention.h"
#include "policy/rank_policy.h"

namespace drrl {

/// What one pass over real text tells about a model: how much each KV group of each layer suffers at each rank and distance, and bases to start
/// from. Kept in one safetensors file that serves every budget and length.
class Calibration {
 public:
  Geometry geometry;
  int64_t seq_len = 0;
  int64_t tokens = 0;
  std::string model;  ///< as the user named it, for messages
  std::string data;
  std::vector<int64_t> ranks;  ///< ascending, below head_dim
  /// Expected KL(full || low rank) in nats per token that the pairs of this layer, KV group, kind (0 scores, 1 values) and tree level add at rank
  /// `ranks[i]`: [layers, groups, 2, levels, ranks] float64.
  at::Tensor damage;
  /// Right factors (P_k for scores, P_o for values) of the best bases for all of the calibration text at once, [layers, groups, 2, d, d] float32: where
  /// `update_basis` starts from.
  at::Tensor bases;

  int64_t layers() const { return damage.size(0); }
  int64_t groups() const { return damage.size(1); }
  int64_t levels() const { return damage.size(3); }
  int64_t head_dim() const { return bases.size(3); }

  /// 16 hexadecimal digits that tell calibrations apart: of the damage and the bases.
  std::string digest() const;

  /// Writes atomically. Errors: Error(kStorage).
  void save(const std::filesystem::path& file) const;

  /// Errors: Error(kModel) that names the file and what is missing, malformed or out of range.
  static Calibration load(const std::filesystem::path& file);
};

/// The ranks of least total damage whose attention, everything counted (core/cost.h, forward, bases updated in `update_steps` steps), takes at most
/// `budget` of the operations of exact attention. Damages are taken as additive; distances beyond the calibrated levels are taken to suffer like the last one.
///
/// A Lagrangian relaxation of the knapsack: every choice minimizes damage + lambda x operations, with the smallest lambda that fits; what is left of
/// the budget is spent on the best further steps. Optimal up to the last step (the choices are many and each is small).
/// `buckets` is the device's list; only those that were calibrated, and head_dim itself at no damage, are used.
/// Errors: Error(kUsage) if no allocation meets the budget.
RankTable allocate(const Calibration& calibration, double budget, const BlockTree& tree, int64_t heads_per_group,
                   const std::vector<int64_t>& buckets, int64_t update_steps);

/// Exact attention that measures, during a backward pass, how far each layer's output would move the model at each rank.
///
/// With labels drawn from the model's own distribution, the gradient g of sum_t -log p(y_t) with respect to a layer's attention output is a
/// score vector, and the Fisher information E[g g^T] is the curvature of KL(full || perturbed). So the damage of an output error
/// D(r) is 1/2 E[(g . D(r))^2]; here summed over positions one by one, which leaves out correlations between positions.
class CalibrationController final : public AttentionController {
 public:
  CalibrationController(int64_t layers, Geometry geometry, std::vector<int64_t> ranks);

  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                    std::shared_ptr<LayerPlan>& plan) override;

  /// Damage in nats, summed over all positions of all backward passes so far, of this process' KV groups: [layers, groups, 2, levels, ranks] float64.
  /// Undefined before the first far pair.
  const at::Tensor& damage() const { return damage_; }

  /// G_q, G_k, G_v and G_o over the same text, sinks left out, [layers, groups, 4, d, d] float64.
  const at::Tensor& grams() const { return grams_; }

 private:
  void measure(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
               const at::Tensor& exact, const at::Tensor& grad);

  int64_t layers_;
  Geometry geometry_;
  std::vector<int64_t> ranks_;
  at::Tensor damage_, grams_;
};

/// The starting bases of a Calibration, from CalibrationController::grams() summed over all text: [layers, groups, 2, d, d] float32.
at::Tensor starting_bases(const at::Tensor& grams);

}  // namespace drrl
