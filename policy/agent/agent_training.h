#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "policy/agent/agent.h"
#include "policy/agent/traces.h"
#include "policy/calibration/calibration.h"

namespace drrl {

class LatencyTable;

struct AgentTrainingOptions {
  int64_t fit_steps = 300;     ///< of the first stage
  int64_t reward_steps = 300;  ///< of the second
  double lr = 3e-3;            ///< at the start; falls linearly to a tenth in each stage
  int64_t held_out = 1;  ///< sequences of each trace file, the last ones, that are not trained on
                         ///< but judged by
  int64_t
      validation = 2;  ///< those before them, at least 2: they decide how far the agent is trusted
  std::vector<double> budgets = {0.3, 0.4, 0.5, 0.585, 0.7, 0.8};
  std::vector<int64_t> buckets;  ///< of the device
  int64_t update_steps = 2;
  bool with_gates = false;
  std::shared_ptr<const LatencyTable>
      latency = nullptr;  ///< budgets are of its time, else of operations
  uint64_t seed = 1;
};

/// Damage on sequences that were not trained on, in nats per token, of decisions that cost the
/// same: allowed is what the budget allows of the cost that was met.
struct BudgetReport {
  int64_t seq_len;
  double budget;
  std::vector<double> dp;     ///< the calibration's choices, by sequence
  std::vector<double> agent;  ///< by sequence; state and network are paid for
  double refitted;  ///< as dp, with the mean damage of the training sequences, pair by pair: what
                    ///< more calibration text gives without an agent
  double oracle;    ///< decides pair by pair by one measurement of the very sequence, judged by the
                    ///< other
  double bound;     ///< decides by all measurements and is judged by the same, noise included: no
                    ///< policy can spoil less
  double agent_cost;  ///< what the agent's own prices take, of exact attention's, state and network
                      ///< included: close to the budget
};

/// Of all sequences of a report.
double mean_damage(const std::vector<double>& sequences);

/// Trains the agent on traces, whose rewards are known in full: no action is sampled, every
/// expectation is exact.
///
/// 1. Value fit: the factor on the calibrated damage is fitted by the gamma deviance y e^-f + f,
///    whose minimum is the conditional mean of y given the state, however heavy the tail of y. With
///    gates the share of entries that each makes exact is fitted likewise.
/// 2. Policy gradient: at prices drawn from those of `budgets`, choices are drawn from
///    softmax(-(damage + price operations) / temperature) and the expected cost
///    sum_a pi(a) (true damage + price operations) is lowered by its exact gradient, while the
///    temperature is annealed ("reward: fidelity against latency", arXiv 2512.15973, with
///    operations for latency).
/// 3. Trust: the strength in {0, 1/4, .. 1} that surely gains most on the validation sequences,
///    over all budgets: its gain over the calibration's choices less twice that gain's standard
///    error over the sequences. An agent that has learned nothing that carries over gets 0, and
///    decides like the calibration.
///
/// Finally factors on the prices are found with which the agent meets each budget on the training
/// sequences.
///
/// With gates what a choice costs depends on the text, too: decisions are made by expected costs,
/// and judged by those that were met. All traces must be of this calibration. Budgets that cannot
/// be met at a trace's length are left out there. Errors: Error(kUsage) if a trace does not fit the
/// calibration or has too few sequences (held_out, two for validation, and one to learn from);
/// Error(kNumerics) if the loss is not finite.
std::vector<BudgetReport> train_agent(RankAgent& agent, const Calibration& calibration,
                                      const std::vector<Traces>& traces,
                                      const AgentTrainingOptions& options,
                                      const std::function<void(const std::string&)>& log);

}  // namespace drrl
