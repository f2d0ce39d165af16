#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "models/causal_lm/causal_lm.h"

namespace drrl {

/// A question to a language model: which of `targets` follows the first `at` tokens of a text? With
/// one target: does the model say it by itself?
struct Question {
  int64_t at = 0;                        ///< [1, C]
  std::vector<at::Tensor> targets = {};  ///< one or more, [T_i] int64, T_i >= 1
  int64_t answer = 0;                    ///< index of the right target
};

/// A text and what is asked about it.
struct Example {
  std::string id;
  at::Tensor context;  ///< [C] int64, C >= 1
  std::vector<Question> questions;
};

/// A JSON object a line, {"id": str, "context": [ids], "targets": [[ids], ...], "answer": index} to
/// ask what follows the context, or {"id": str, "context": [ids], "questions": [{"at": tokens,
/// "targets": [[ids], ...], "answer": index}, ...]} to ask at one or more places of it; other keys
/// are left alone. Empty lines do not count. Errors: Error(kData) naming file, line, value and what
/// was expected: keys, types, token ids of the vocabulary, nothing empty, places within the
/// context, context and target within the model's positions, ids all different.
std::vector<Example> read_examples(const std::filesystem::path& path, const ModelConfig& config);

struct QuestionScore {
  std::vector<double> logprobs;  ///< of each target: sum over its tokens of log p(token | tokens
                                 ///< before `at`, target tokens before it)
  /// One target: each of its tokens is the most likely one (as lm-evaluation-harness counts last
  /// words); several: the answer has the largest logprob. Ties count as wrong.
  bool right = false;
};

/// A score for each question. One pass over the context serves all targets that it goes on with
/// itself, but for their last tokens; any other takes a pass over what stands before it and the
/// target, shared by those that differ in their last tokens only. So many questions about one text
/// cost one pass, and under a rank policy have the ranks of the whole text. Logits exist for the
/// targets' tokens only. Collective over the model's tensor-parallel ranks; not for a split
/// sequence (context parallelism). Errors: the model's, with the example's id and length before
/// them; Error(kNumerics) for a log-probability that is not finite.
std::vector<QuestionScore> score(CausalLM& model, const Example& example);

}  // namespace drrl
