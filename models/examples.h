#pragma once

#include "models/llama.h"

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace drrl {

/// A question to a language model: which of `targets` follows `context`? With one target: does the model say it by itself?
struct Example {
  std::string id;
  at::Tensor context;                    ///< [C] int64, C >= 1
  std::vector<at::Tensor> targets = {};  ///< one or more, [T_i] int64, T_i >= 1
  int64_t answer = 0;                    ///< index of the right target
};

/// A JSON object a line, {"id": str, "context": [ids], "targets": [[ids], ...], "answer": index}; other keys are left alone. Empty lines do not count.
/// Errors: Error(kData) naming file, line, value and what was expected: keys, types, token ids of the vocabulary, nothing empty, context and target
/// within the model's positions, ids all different.
std::vector<Example> read_examples(const std::filesystem::path& path, const ModelConfig& config);

struct ExampleScore {
  std::vector<double> logprobs;  ///< of each target: sum over its tokens of log p(token | context, target tokens before it)
  /// One target: each of its tokens is the most likely one (as lm-evaluation-harness counts last words); several: the answer has the largest logprob.
  /// Ties count as wrong.
  bool right = false;
};

/// One pass over context and target for each target, or one for neighbours that differ in their last tokens only; logits exist for the target's tokens
/// only. Collective over the model's tensor-parallel ranks; not for a split sequence (context parallelism). Errors: the model's, with the example's id and length before them; Error(kNumerics) for a
/// log-probability that is not finite.
ExampleScore score(CausalLM& model, const Example& example);

}  // namespace drrl
