#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "core/types/block_tree.h"
#include "core/types/ranks.h"
#include "policy/rank_table.h"

namespace drrl {

class Calibration;
class LatencyTable;
class RankAgent;

/// The ranks that a device runs without waste, ascending, the last one `head_dim` itself (exact):
/// multiples of 16 on a CPU; 32, 64, 96, 128 on CUDA, whose flash kernels pad to those. Head dims
/// below 64 (test models) are cut into four steps.
std::vector<int64_t> rank_buckets(const at::Device& device, int64_t head_dim);

/// What a policy may look at when it chooses the ranks of one layer: nothing but the past of every
/// pair's queries.
struct LayerObservation {
  int64_t layer;
  int64_t batch;
  int64_t heads;        ///< query heads of these groups, on this process and others that share one
  int64_t groups;       ///< KV groups on this process
  int64_t first_group;  ///< the first of them among the model's
  int64_t head_dim;
  const BlockTree& tree;  ///< of the whole sequence, or of the longest that it may become
  /// Share of the energy ||X Y^T||_F^2 that is lost at rank r, column r of [B G pairs, d + 1]
  /// float64, from each pair's own spectrum: of the scores and of the values as W_O sees them.
  /// Defined only if the policy `needs_spectra()`.
  at::Tensor score_loss = {};
  at::Tensor value_loss = {};
  at::Tensor state =
      {};  ///< pair_state, [B, G, pairs, features]; defined only if the policy has state_ranks()
  int64_t
      first_pair = 0;  ///< the pairs of the tree to decide about are this one and those after it,
  int64_t pairs = -1;  ///< so many; -1: all

  int64_t pair_count() const { return pairs < 0 ? tree.num_pairs() : pairs; }
  int64_t items() const { return batch * groups * pair_count(); }
};

/// Chooses the ranks of every far pair of a layer: one entry per (batch, KV group, pair), pair
/// innermost. Deterministic.
class RankPolicy {
 public:
  virtual ~RankPolicy() = default;
  virtual std::vector<Ranks> decide(const LayerObservation& observation) = 0;
  virtual bool needs_spectra() const { return false; }
  /// The ranks that pair_state is to be about; empty: none is needed. Needs starting bases from a
  /// calibration.
  virtual std::vector<int64_t> state_ranks() const { return {}; }
  /// Operations that a decision takes, for each pair.
  virtual double flops_per_pair() const { return 0; }
  /// Decides by this calibration from now on, whose shape is the one it has. Errors: Error(kUsage)
  /// if it decides by none.
  virtual void set_calibration(const Calibration& calibration);
  /// Whether every rank is the head dim, whatever the layer.
  virtual bool exact() const { return false; }
  /// What the decisions made last take of exact attention's time, by the latencies that the policy
  /// spends; none: it spends no latencies, or has not decided.
  virtual std::optional<double> latency_fraction() const { return std::nullopt; }
  /// One line for banners and for comparing runs: the name and whatever shapes the decisions.
  virtual std::string describe() const = 0;
};

/// Every rank is the head dim: exact attention.
std::unique_ptr<RankPolicy> make_exact_policy();

/// The same rank everywhere. Errors: Error(kUsage) unless 1 <= rank <= head_dim.
std::unique_ptr<RankPolicy> make_fixed_policy(int64_t rank, int64_t head_dim);

/// Per pair the smallest bucket that keeps the share `energy` of the spectrum, for scores and
/// values apart ("adaptive SVD" in the paper's comparison). Errors: Error(kUsage) unless 0 < energy
/// <= 1.
std::unique_ptr<RankPolicy> make_energy_policy(double energy, std::vector<int64_t> buckets);

/// The ranks of `policy`, and a threshold below which tiles are dropped (Ranks::drop), in every far
/// pair. Errors: Error(kUsage) unless 0 < drop < 1.
std::unique_ptr<RankPolicy> make_dropping_policy(std::unique_ptr<RankPolicy> policy, double drop);

/// The ranks of a table, whatever the text. Errors: when it decides, c10::Error if the table is of
/// fewer layers, groups or levels.
std::unique_ptr<RankPolicy> make_table_policy(RankTable table, std::string description);

/// Per layer, KV group, tree level and kind the ranks that do the least calibrated damage within
/// `budget` of exact attention's operations, or with a latency table of its time: `allocate()`,
/// once for each length of sequence. with_gates: and the gates (Ranks::gate) by which single
/// entries are exact after all. Errors: Error(kUsage) unless 0 < budget <= 1; when it decides, also
/// if the budget cannot be met at that length, or without calibrated gates.
std::unique_ptr<RankPolicy> make_dp_policy(Calibration calibration, double budget,
                                           std::vector<int64_t> buckets, int64_t update_steps,
                                           bool with_gates = false,
                                           std::shared_ptr<const LatencyTable> latency = nullptr);

/// Baselines that spend the same budget on the same choices: step by step where it helps most at
/// once, and at random by `seed` (AllocationMethod, allocation.h). Errors: as make_dp_policy.
std::unique_ptr<RankPolicy> make_greedy_policy(
    Calibration calibration, double budget, std::vector<int64_t> buckets, int64_t update_steps,
    std::shared_ptr<const LatencyTable> latency = nullptr);
std::unique_ptr<RankPolicy> make_random_policy(
    Calibration calibration, double budget, std::vector<int64_t> buckets, int64_t update_steps,
    uint64_t seed, std::shared_ptr<const LatencyTable> latency = nullptr);

/// The learned policy: as dp, but pair by pair, and every calibrated damage times the agent's
/// factor for what it sees of this text (agent.h). It meets the budget on average over texts like
/// those it was trained on, not exactly on each. What it learned spending operations serves
/// milliseconds, too, but then the budget is met less well. Errors: as make_dp_policy;
/// Error(kUsage) also if a trusted agent has learned without gates and shall choose them, or the
/// other way round.
std::unique_ptr<RankPolicy> make_rl_policy(Calibration calibration, RankAgent agent, double budget,
                                           std::vector<int64_t> buckets, int64_t update_steps,
                                           bool with_gates = false,
                                           std::shared_ptr<const LatencyTable> latency = nullptr);

}  // namespace drrl
