#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <string>
#include <vector>

#include "core/lowrank_attention.h"
#include "policy/attention.h"

namespace drrl {

/// How much each layer suffers at each rank, measured on real text, and where that was measured. Kept in a JSON file, so
/// that one calibration pass serves every budget.
class Calibration {
 public:
  int64_t head_dim = 0;
  Geometry geometry;
  int64_t seq_len = 0;
  int64_t tokens = 0;
  std::string model;  ///< as the user named it, for messages
  std::string data;
  std::vector<int64_t> ranks;  ///< ascending, below head_dim
  /// Expected KL(full || low rank) in nats per token if only this layer's scores (values) have rank `ranks[i]`: [layer][i].
  std::vector<std::vector<double>> score_damage;
  std::vector<std::vector<double>> value_damage;

  int64_t layers() const { return static_cast<int64_t>(score_damage.size()); }

  /// Writes atomically. Errors: Error(kStorage).
  void save(const std::filesystem::path& file) const;

  /// Errors: Error(kModel) that names the file and the field that is missing, malformed or out of range.
  static Calibration load(const std::filesystem::path& file);
};

/// Ranks per layer of least total damage with sum over layers of (r + r_v) / (2 d layers) <= budget: dynamic programming over the layers, exact
/// on the grid of the buckets. Damages are taken as additive over layers and kinds.
/// `buckets` is the device's list; only those that were calibrated, and head_dim itself at no damage, are used.
/// Errors: Error(kUsage) if the calibration is of another shape of model, or no allocation meets the budget.
std::vector<Ranks> allocate(const Calibration& calibration, double budget, int64_t layers, int64_t head_dim,
                            const std::vector<int64_t>& buckets);

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

  /// Damage per layer, kind (0 scores, 1 values) and rank, in nats, summed over all backward passes so far: [layers, 2, ranks] float64. Of
  /// this rank's KV groups; sums over tensor-parallel ranks.
  const at::Tensor& damage() const { return damage_; }

 private:
  void measure(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
               const at::Tensor& exact, const at::Tensor& grad);

  Geometry geometry_;
  std::vector<int64_t> ranks_;
  at::Tensor damage_;
};

}  // namespace drrl
