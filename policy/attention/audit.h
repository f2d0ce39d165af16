#pragma once

#include <memory>
#include <vector>

#include <ATen/ATen.h>

#include "core/attention/certificate.h"
#include "policy/attention/attention_controller.h"

namespace drrl {

/// Figures of which quantiles are reported.
class Sample {
 public:
  void add(double value);  ///< NaN, a ratio where nothing was lost, is left out
  void add(const Sample& other) {
    values_.insert(values_.end(), other.values_.begin(), other.values_.end());
  }
  int64_t size() const { return static_cast<int64_t>(values_.size()); }
  /// The nearest-rank quantile, p in 0..1; NaN without values.
  double quantile(double p) const;

 private:
  std::vector<double> values_;
};

/// Certificates (core/attention/certificate.h) against what really happened to sampled query
/// tokens. Ratios of norms.
struct AuditReport {
  /// Far pairs of one tree level whose scores are low-rank; the unit is (call, sequence, KV group,
  /// pair).
  struct Level {
    int64_t pairs = 0;
    int64_t violations = 0;  ///< units with a row whose error exceeds its bound
    Sample tightness;  ///< bound / true error of the scores as served, both in Frobenius norm over
                       ///< the sampled rows
    /// Loss of the scores as the Gram of the *left* node's queries predicts it / loss for the
    /// queries that are served, all of them: no bound, a prediction.
    Sample lagged_prediction;
  };
  std::vector<Level> levels;
  /// Query blocks that see a low-rank pair; the unit is (call, sequence, KV group, block).
  int64_t blocks = 0;
  int64_t block_violations = 0;
  Sample output_tightness;  ///< bound / true error of the attention output before W_O, in Frobenius
                            ///< norm over the sampled rows
  Sample eq9_tightness;     ///< the same for the paper's Eq. 9 alone
  Sample output_error;      ///< true error / norm of the exact rows
  Sample score_loss, value_loss;  ///< lost shares of the energy, of scores and of values as W_O
                                  ///< sees them; one a low-rank pair
  /// What replacing the starting subspace by the pair's own changes (SubspaceChange), one a
  /// low-rank pair.
  Sample weyl, shift, davis_kahan, sine;
};

/// Errors beyond bound x (1 + kAuditTolerance), and for outputs beyond that + kAuditTolerance x the
/// longest value row, are violations: float32 kernels round by about that much of what they sum,
/// which no bound of the approximation knows of.
inline constexpr double kAuditTolerance = 1e-5;

/// Attention by `inner`, unchanged, after each low-rank call of which the audit attends a few query
/// tokens exactly, in float64 on the CPU, and compares. Slow, and not part of any time that `inner`
/// measures. Calls that replay a plan and calls of `extend` are not audited.
class AuditController final : public AttentionController {
 public:
  /// tokens: evenly spread query tokens of each block, audited for all heads, so each pair gets at
  /// least as many. start: the bases that updates start from, [layers, G, 2, d, d], for
  /// SubspaceChange; undefined: those of each sequence's first pair.
  AuditController(std::shared_ptr<AttentionController> inner, int64_t tokens,
                  at::Tensor start = {});

  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) override;
  std::unique_ptr<KvCache> make_cache(int64_t layers, int64_t horizon) const override;
  at::Tensor extend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o, KvCache& cache) override;

  const AuditReport& report() const { return report_; }

 private:
  void audit(const LayerPlan& served, int64_t layer, const at::Tensor& q, const at::Tensor& k,
             const at::Tensor& v, const at::Tensor& w_o, const at::Tensor& out);

  std::shared_ptr<AttentionController> inner_;
  int64_t tokens_;
  at::Tensor start_;
  AuditReport report_;
};

}  // namespace drrl
