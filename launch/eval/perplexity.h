#pragma once

#include <cstdint>

#include <nlohmann/json.hpp>

#include "distributed/topology/mesh.h"
#include "launch/eval/decisions.h"
#include "models/causal_lm/causal_lm.h"
#include "models/data/sequence_dataset.h"
#include "policy/attention/lowrank_controller.h"

namespace drrl {

/// How many sequences of the data --max_tokens leaves.
int64_t window_flag(const SequenceDataset& data);

/// Mean loss over the first `windows` sequences of the data under the controller's policy, and
/// under exact attention as well with --compare_exact. `decisions`, if any, writes down those of
/// the controller's policy.
nlohmann::ordered_json perplexity(CausalLM& model, LowRankController& controller,
                                  DecisionRecorder* decisions, const SequenceDataset& data,
                                  int64_t windows, const Mesh& mesh);
void print_perplexity(const nlohmann::ordered_json& json);

}  // namespace drrl
