#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "core/types/block_tree.h"
#include "policy/attention/attention_controller.h"

namespace drrl {

/// Exact attention that measures, during a backward pass, how far each layer's output would move
/// the model at each rank (loss_sensitivity.h). Summed over positions one by one, which leaves out
/// correlations between positions.
class CalibrationController final : public AttentionController {
 public:
  CalibrationController(int64_t layers, Geometry geometry, std::vector<int64_t> ranks);

  /// From now on keeps `pairs()` of the last backward pass. start [layers, G, 2, d, d]: the bases
  /// that pair_state is about.
  void record(at::Tensor start) { start_ = std::move(start); }
  /// Of every far pair what a policy would have seen and what its choices would have done; nats are
  /// sums over the pair's queries.
  struct PairRecord {
    at::Tensor state;          ///< pair_state, [layers, B, groups, pairs, pair_features] float32
    at::Tensor damage;         ///< [layers, B, groups, 2, pairs, ranks] float64
    at::Tensor gated_damage;   ///< [layers, B, groups, 2, pairs, ranks, gates] float64
    at::Tensor exact_entries;  ///< share of the pair's, [layers, B, groups, pairs, ranks + 1,
                               ///< gates] float64
  };
  const PairRecord& pairs() const { return pairs_; }

  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) override;

  /// Damage in nats, summed over all positions of all backward passes so far, of this process's KV
  /// groups: [layers, groups, 2, levels, ranks] float64. Undefined before the first far pair.
  const at::Tensor& damage() const { return damage_; }

  /// The same with gates and the entries that they made exact, summed likewise, as in Calibration;
  /// measured at default_gates().
  const at::Tensor& gated_damage() const { return gated_damage_; }
  const at::Tensor& exact_entries() const { return exact_entries_; }
  /// Entries (of a head) of each level seen so far.
  const at::Tensor& entries() const { return entries_; }
  static at::Tensor default_gates() {
    return at::tensor({0.001, 0.002, 0.005, 0.01, 0.02, 0.05}, at::kDouble);
  }

  /// G_q, G_k, G_v (weighted by attention_mass) and G_o over the complete blocks of the same text,
  /// sinks left out, [layers, groups, 4, d, d] float64.
  const at::Tensor& grams() const { return grams_; }

 private:
  void measure(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
               const at::Tensor& w_o, const at::Tensor& grad);

  int64_t layers_;
  Geometry geometry_;
  std::vector<int64_t> ranks_;
  at::Tensor damage_, gated_damage_, exact_entries_, entries_, grams_, start_;
  PairRecord pairs_;
};

/// The starting bases of a Calibration, from CalibrationController::grams() summed over all text:
/// [layers, groups, 2, d, d] float32.
at::Tensor starting_bases(const at::Tensor& grams);

}  // namespace drrl
