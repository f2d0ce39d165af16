#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "core/io/safetensors.h"
#include "core/types/block_tree.h"
#include "core/types/ranks.h"
#include "policy/allocation/cost_model.h"
#include "policy/attention/attention_controller.h"
#include "policy/rank_table.h"

namespace drrl {

class LatencyTable;

/// What one pass over real text tells about a model: how much each KV group of each layer suffers
/// at each rank and distance, and bases to start from. Kept in one safetensors file that serves
/// every budget and length.
class Calibration {
 public:
  Geometry geometry;
  int64_t seq_len = 0;
  int64_t tokens = 0;
  std::string model;  ///< as the user named it, for messages
  std::string data;
  std::vector<int64_t> ranks;  ///< ascending, below head_dim
  /// Expected KL(full || low rank) in nats per token that the pairs of this layer, KV group, kind
  /// (0 scores, 1 values) and tree level add at rank `ranks[i]`: [layers, groups, 2, levels, ranks]
  /// float64.
  at::Tensor damage;
  /// Gates (Ranks::gate) that were measured, [gates] float64 ascending; this and the next two may
  /// be undefined, in which case no gates can be chosen.
  at::Tensor gates;
  /// `damage` when gates make entries exact, those of values by exact scores: [layers, groups, 2,
  /// levels, ranks, gates] float64.
  at::Tensor gated_damage;
  /// Share of a level's entries that gates make exact: [layers, groups, levels, C, gates] float64,
  /// by score rank (C: `ranks`, then exact).
  at::Tensor exact_entries;
  /// Right factors (P_k for scores, P_o for values) of the best bases for all of the calibration
  /// text at once, [layers, groups, 2, d, d] float32: where `update_basis` starts from.
  at::Tensor bases;

  int64_t layers() const { return damage.size(0); }
  int64_t groups() const { return damage.size(1); }
  int64_t levels() const { return damage.size(3); }
  int64_t head_dim() const { return bases.size(3); }
  int64_t gate_count() const { return gates.defined() ? gates.size(0) : 0; }

  /// 16 hexadecimal digits that tell calibrations apart: of the damage and the bases.
  std::string digest() const;

  /// Writes atomically. Errors: Error(kStorage).
  void save(const std::filesystem::path& file) const;

  /// What `save` writes.
  std::vector<NamedTensor> tensors() const;
  std::map<std::string, std::string> metadata() const;

  /// Errors: Error(kModel) that names the file and what is missing, malformed or out of range.
  static Calibration load(const std::filesystem::path& file);
};

/// `calibration` with every damage times e^log_factors, [layers, groups, 2, levels, ranks] float64;
/// what gates leave of it likewise.
Calibration scaled(const Calibration& calibration, const at::Tensor& log_factors);

/// The damage that `calibration` expects of a table's ranks and gates, which must be its own [nats
/// per token].
double expected_damage(const Calibration& calibration, const RankTable& table);

/// What can be chosen for the far pairs of one tree, and what it costs and spoils.
class Choices {
 public:
  /// `buckets` is the device's list; only those that were calibrated are choices, and head_dim
  /// itself, exact, the last one. with_gates: and the calibrated gates. Errors: Error(kUsage) if
  /// there are none.
  Choices(const Calibration& calibration, const BlockTree& tree,
          const std::vector<int64_t>& buckets, const Prices& prices, bool with_gates = false);

  /// What one pair costs at choice i, everything that depends on it counted.
  double cost(int64_t pair, int64_t kind, size_t i) const {
    return costs[(static_cast<size_t>(run_of[static_cast<size_t>(pair)]) * 2 +
                  static_cast<size_t>(kind)) *
                     ranks.size() +
                 i];
  }
  /// What a gate adds to that of a pair whose scores are at choice i: itself and, times `entries`,
  /// as many exact entries as the calibration met.
  double gate_cost(int64_t layer, int64_t group, int64_t pair, size_t i, int64_t gate,
                   double entries = 1) const;
  /// One pair's share of its level's calibrated damage, by its queries, at choice i and a gate, -1:
  /// none [nats per token of the sequence]; distances beyond the calibrated levels are taken to
  /// suffer like the last one.
  double damage(int64_t layer, int64_t group, int64_t kind, int64_t pair, size_t i,
                int64_t gate = -1) const;

  std::vector<int64_t> ranks;
  std::vector<int64_t> columns;   ///< of Calibration::damage, for all but the last
  std::vector<int64_t> run_of;    ///< of each pair
  std::vector<int64_t> level_of;  ///< of each pair
  std::vector<double> share_of;   ///< of each pair: its queries over those of its level
  std::vector<float> gates;       ///< without gates empty
  std::vector<double> costs;      ///< [runs, 2, choices]
  std::vector<double> gated_costs,
      exact_costs;  ///< of a pair of each run: a gate, all its entries exact

 private:
  int64_t calibrated_level(int64_t pair) const;

  at::Tensor damage_, gated_damage_, exact_entries_;  // the calibration's, contiguous
};

/// How a budget is spent. kBest: Lagrangian, below. kGreedy: from the smallest ranks everywhere,
/// always the step that saves most damage for an operation. kRandom: any choices that fit, whatever
/// they spoil, by a seed; the baseline that everything must beat.
enum class Spending { kBest, kGreedy, kRandom };

struct Allocation {
  RankTable table;
  double price;  ///< of an operation (or ns), in nats per token: what its last ones bought; 0
                 ///< unless kBest
  double
      spent;  ///< all costs, as a share of exact attention's: at most the budget, but for rounding
};

/// The ranks of least total damage whose attention, everything counted (core/attention/flops.h,
/// forward, bases updated in `update_steps` steps), takes at most `budget` of the operations of
/// exact attention. Damages are taken as additive; distances beyond the calibrated levels are taken
/// to suffer like the last one.
///
/// A Lagrangian relaxation of the knapsack: every choice minimizes damage + lambda x operations,
/// with the smallest lambda that fits; what is left of the budget is spent on the best further
/// steps. Optimal up to the last step (the choices are many and each is small). Choices as above.
/// Errors: Error(kUsage) if no allocation meets the budget. with_gates: gates are chosen along with
/// the ranks. As many entries are taken to be exact as the calibration met; on another text they
/// are what they are. latency: if given, the budget is a share of exact attention's time on the
/// device that was measured, and `update_steps` is the table's affair. Errors: Error(kUsage) also
/// if the table is of another shape, lacks a rank of `buckets` that was calibrated, or, with gates,
/// lacks theirs.
Allocation allocate(const Calibration& calibration, double budget, const BlockTree& tree,
                    int64_t heads_per_group, const std::vector<int64_t>& buckets,
                    int64_t update_steps, Spending how = Spending::kBest, uint64_t seed = 0,
                    bool with_gates = false, const LatencyTable* latency = nullptr);

/// Exact attention that measures, during a backward pass, how far each layer's output would move
/// the model at each rank.
///
/// With labels drawn from the model's own distribution, the gradient g of sum_t -log p(y_t) with
/// respect to a layer's attention output is a score vector, and the Fisher information E[g g^T] is
/// the curvature of KL(full || perturbed). So the damage of an output error D(r) is 1/2 E[(g .
/// D(r))^2]; here summed over positions one by one, which leaves out correlations between
/// positions.
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

  /// Damage in nats, summed over all positions of all backward passes so far, of this process' KV
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
