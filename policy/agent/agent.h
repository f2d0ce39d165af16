#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "core/io/safetensors.h"
#include "policy/calibration/calibration.h"

namespace drrl {

/// The learned part of the policy: a light Transformer over the layers (arXiv 2512.15973, section
/// on the policy network) that says how much more or less than usual *this* text suffers at each
/// rank.
///
/// One token for each layer, one sequence for each far pair of each KV group; a layer attends to
/// itself and the layers below it, which ran before. Token: W (state - mean) / deviation +
/// embedding of (layer, KV group). Two pre-norm blocks of width 32 (two heads, SiLU MLP of twice
/// the width), then a linear map to logarithms of factors: on the calibrated damage of scores and
/// values at each rank, with every gate and without one, and on the entries that a gate makes
/// exact. It starts at zero: an untrained agent decides like the calibration alone.
class RankAgent {
 public:
  static constexpr int64_t kWidth = 32, kHeads = 2, kBlocks = 2;
  /// Factors stay within [e^-kLimit, e^kLimit].
  static constexpr double kLimit = 3;

  /// Logarithms of factors, of N pairs at T layers.
  struct Factors {
    at::Tensor damage;   ///< on Calibration::damage and, from the second column on, gated_damage:
                         ///< [N, T, 2, ranks, 1 + gates]
    at::Tensor entries;  ///< on Calibration::exact_entries: [N, T, ranks + 1, gates]
  };

  /// gates: how many are calibrated, 0 for a calibration without. Deterministic in `seed`.
  RankAgent(int64_t layers, int64_t groups, std::vector<int64_t> ranks, int64_t gates,
            uint64_t seed);

  /// Keys and values of the layers so far in each block, [N, heads, layers, width / heads].
  using Memory = std::vector<std::pair<at::Tensor, at::Tensor>>;

  /// state [N, T, features] of N pairs at the T layers from first_layer on, group [N] int64. With a
  /// memory T is 1, first_layer follows what is in it, and the layer is added; without one the
  /// layers see each other.
  Factors forward(const at::Tensor& state, const at::Tensor& group, int64_t first_layer,
                  Memory* memory = nullptr) const;

  /// Trainable, fp32, CPU.
  std::vector<at::Tensor>& parameters() { return parameters_; }
  /// What states are normalized by, [layers, groups, features] each.
  void set_normalization(at::Tensor mean, at::Tensor deviation);
  /// Factors on the price of an operation, by budget, that make the mean cost on the training
  /// traces meet each budget: ascending budgets and as many factors.
  void set_prices(std::vector<double> budgets, std::vector<double> factors);
  /// Whether its trust and its price factors are of choices with gates.
  void set_with_gates(bool with_gates) { with_gates_.fill_(with_gates ? 1 : 0); }
  bool with_gates() const { return with_gates_.item<double>() != 0; }
  /// How far the agent is trusted, 0 (the calibration alone) to 1: scales the logarithms that
  /// `forward` returns.
  void set_strength(double strength) { strength_.fill_(strength); }
  double strength() const { return strength_.item<double>(); }
  /// Interpolated.
  double price_factor(double budget) const;

  int64_t layers() const { return layers_; }
  const std::vector<int64_t>& ranks() const { return ranks_; }
  /// Operations of one pair at one layer.
  double flops() const;

  /// 16 hexadecimal digits that tell agents apart.
  std::string digest() const;

  /// Writes the calibration and the agent into one file, which serves --rank_policy=dp and rl.
  /// Errors: Error(kStorage).
  void save(const std::filesystem::path& file, const Calibration& calibration) const;
  /// The agent in a calibration's file. Errors: Error(kModel), also if the file holds a calibration
  /// alone.
  static RankAgent load(const std::filesystem::path& file, const Calibration& calibration);

 private:
  std::vector<NamedTensor> tensors() const;

  int64_t outputs() const {
    return 2 * static_cast<int64_t>(ranks_.size()) * (1 + gates_) +
           (static_cast<int64_t>(ranks_.size()) + 1) * gates_;
  }

  int64_t layers_, groups_, gates_, features_;
  std::vector<int64_t> ranks_;
  std::vector<at::Tensor> parameters_;
  at::Tensor mean_, deviation_, strength_, budgets_, factors_, with_gates_;
};

}  // namespace drrl
