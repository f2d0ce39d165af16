#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "core/io/safetensors.h"
#include "core/types/block_tree.h"
#include "policy/rank_table.h"

namespace drrl {

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

}  // namespace drrl
