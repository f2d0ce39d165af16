#pragma once

#include <vector>

#include <nlohmann/json.hpp>

#include "distributed/topology/mesh.h"
#include "models/causal_lm/causal_lm.h"
#include "models/data/examples.h"
#include "policy/attention/lowrank_controller.h"

namespace drrl {

/// --examples: the share of questions that is answered right, and what attention cost. `lines` <- a
/// JSON object for each question.
nlohmann::ordered_json answers(CausalLM& model, LowRankController& controller,
                               const std::vector<Example>& examples, const Mesh& mesh,
                               std::vector<nlohmann::ordered_json>& lines);
void print_answers(const nlohmann::ordered_json& json);

}  // namespace drrl
