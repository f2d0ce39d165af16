#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/ATen.h>

#include "core/linalg/gram.h"
#include "core/types/block_tree.h"
#include "policy/calibration/calibration.h"

namespace drrl {

/// Query rows of one call of `attend` whose damage will be known once the backward pass comes by.
struct DamageSample {
  std::vector<int64_t> positions;  ///< tokens of one block, ascending
  std::vector<int64_t> pairs;      ///< far pairs that they see, nearest first
  PairGrams grams;                 ///< of these pairs
};

/// Measures, during training, what every rank would do to the text that is trained on: for a few
/// query rows of each layer the loss gradient g of the attention output is there anyway, and with
/// it the damage 1/2 (g . D(r))^2 of the error D(r) that rank r of one pair makes, exactly as the
/// calibration defines it (CalibrationController), with these differences: labels are the text's
/// and not drawn from the model (empirical Fisher information), the other pairs' ranks are what
/// they are, and bases are made as training makes them, so that what updates do not reach counts.
///
/// All ranks are measured, so the reward of any decision is known and no action need be explored.
class DamageSampler {
 public:
  /// Of so many calls one is sampled, in turn with other layers: making bases is most of the cost.
  static constexpr int64_t kTurns = 4;

  struct Options {
    int64_t rows = 32;  ///< query rows of one block in each sampled call
    uint64_t seed = 1;  ///< of which rows; with the step and the layer nothing else decides, so
                        ///< processes that share a sequence choose alike
    double gradient_scale = 1;  ///< times the gradients that arrive = gradients of the summed loss
                                ///< in nats
    int64_t update_steps = 2;   ///< as BasisOptions
    std::vector<int64_t> buckets;  ///< of the device: other calibrated ranks are not measured
  };

  /// first_group, groups: this process's KV groups among the calibration's. device: where sums are
  /// kept.
  DamageSampler(const Calibration& calibration, int64_t first_group, int64_t groups,
                at::Device device, Options options);

  /// From now on calls are sampled, as of this step; until `pause`.
  void begin(int64_t step);
  void pause() { active_ = false; }

  /// Whether the call that begins now is to be sampled. Once a call.
  bool draws(int64_t layer);
  /// Its rows: a block is drawn, then rows evenly spread over it. grams: of all pairs, at least
  /// one.
  std::shared_ptr<const DamageSample> choose(int64_t layer, const BlockTree& tree,
                                             const PairGrams& grams) const;

  /// Measures `sample` when the gradient of `out` comes by. out, q [B, H, L, d]; k, v [B, G, L, d];
  /// w_o [hidden, H d].
  void watch(int64_t layer, const BlockTree& tree, const at::Tensor& out, const at::Tensor& q,
             const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
             std::shared_ptr<const DamageSample> sample);

  /// What sums() adds up, and from where on.
  enum Sum : int64_t { kDamage, kCount, kSums };

  /// Over what was sampled since the last `reset`: damage in nats per token of the sequence (mean
  /// over a sample's rows, times the share of all rows that see a pair of that level), and the
  /// number of samples: [kSums, layers, groups, 2, levels, ranks] float64, cells as in
  /// Calibration::damage.
  const at::Tensor& sums() const { return sums_; }
  void reset(const at::Tensor& sums = {});

  /// Time in `watch`ed measurements since the last call [ms]; on CUDA of their launches.
  double take_ms();

 private:
  void measure(int64_t layer, const BlockTree& tree, const at::Tensor& q, const at::Tensor& k,
               const at::Tensor& v, const at::Tensor& w_o, const DamageSample& sample,
               const at::Tensor& grad);

  Options options_;
  std::vector<int64_t> ranks_;    // measured
  std::vector<int64_t> columns_;  // of Calibration::damage, for each of them
  at::Tensor start_;              // [layers, groups, 2, d, d]
  at::Tensor sums_;
  std::vector<int64_t> calls_;  // of each layer, in this step
  int64_t step_ = 0;
  bool active_ = false;
  double ms_ = 0;
};

}  // namespace drrl
