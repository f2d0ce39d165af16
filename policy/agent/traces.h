#pragma once

#include <array>
#include <filesystem>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "core/types/block_tree.h"
#include "policy/calibration/calibration.h"
#include "policy/calibration/calibration_controller.h"

namespace drrl {

/// What a learned policy learns from offline: of many texts the state of every far pair and what
/// every rank would have cost it, so that the expected reward of any policy on them is known in
/// full, without sampling actions.
class Traces {
 public:
  /// Independent measurements of the same damage (draws of labels): one can choose while the other
  /// judges.
  static constexpr int64_t kDraws = 2;

  Traces() = default;
  /// All zero.
  Traces(int64_t sequences, int64_t layers, int64_t groups, int64_t seq_len, Geometry geometry,
         std::vector<int64_t> ranks, at::Tensor gates);

  int64_t seq_len = 0;
  Geometry geometry;
  int64_t heads_per_group = 0;
  std::string calibration;  ///< digest of the calibration whose bases the states are about
  std::string source;  ///< what they are recorded from and to be of when complete, for people and
                       ///< for going on
  std::vector<int64_t> ranks;
  at::Tensor tokens;  ///< [sequences, seq_len] int64: with the model's embeddings what else could
                      ///< be seen of the texts
  at::Tensor state;   ///< [sequences, layers, groups, pairs, pair_features] float32
  at::Tensor gates;   ///< [gates] float64, as Calibration::gates
  at::Tensor damage;  ///< nats over a pair's queries, [sequences, draws, layers, groups, 2, pairs,
                      ///< ranks] float32
  at::Tensor gated_damage;   ///< the same behind each gate, [sequences, draws, layers, groups, 2,
                             ///< pairs, ranks, gates] float32
  at::Tensor exact_entries;  ///< share of a pair's entries that gates make exact, by score rank,
                             ///< [sequences, layers, groups, pairs, ranks + 1, gates] float32

  /// What is measured of each sequence.
  static constexpr std::array kMeasured = {&Traces::state, &Traces::damage, &Traces::gated_damage,
                                           &Traces::exact_entries};

  int64_t sequences() const { return state.size(0); }
  /// Views of the first so many sequences.
  Traces first(int64_t count) const;

  /// What was recorded of one sequence, of the KV groups from first_group on.
  void put(int64_t sequence, int64_t draw, int64_t first_group,
           const CalibrationController::PairRecord& pairs);

  /// Writes atomically. Errors: Error(kStorage).
  void save(const std::filesystem::path& file) const;
  /// Errors: Error(kModel) that names the file and what is missing or malformed.
  static Traces load(const std::filesystem::path& file);
};

}  // namespace drrl
