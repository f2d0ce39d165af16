#pragma once

#include <nlohmann/json.hpp>

#include "distributed/topology/mesh.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/config.h"
#include "models/data/token_file.h"
#include "policy/attention/lowrank_controller.h"

namespace drrl {

/// Errors: Error(kUsage) if --prompt_tokens, --generate, --temperature or --top_k do not fit the
/// text, the model, or processes of this shape.
void check_generation(const ModelConfig& config, const TokenFile& file, const MeshShape& shape);

/// --generate: tokens, speed, and the bytes of the cache over all tensor-parallel ranks against
/// those of a cache of exact keys and values.
nlohmann::ordered_json generation(CausalLM& model, LowRankController& controller,
                                  const TokenFile& file, const Mesh& mesh);
void print_generation(const nlohmann::ordered_json& json);

}  // namespace drrl
