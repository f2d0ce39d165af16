#pragma once

#include <cstdint>

#include "models/causal_lm/causal_lm.h"

namespace drrl {

struct GenerationOptions {
  int64_t tokens = 1;        ///< how many to add
  double temperature = 0.0;  ///< of the distribution that is drawn from; 0: always the most likely
                             ///< token
  int64_t top_k = 0;         ///< draw only from this many most likely tokens; 0: from all
  uint64_t seed = 1;         ///< of the draws
};

struct Generation {
  at::Tensor tokens;  ///< [options.tokens] int64, without the prompt
  double prefill_seconds = 0,
         decode_seconds = 0;  ///< all of the prompt; the steps after it, one fewer than tokens
  int64_t cached_tokens = 0;  ///< at the end: prompt and tokens but the last
  int64_t cache_bytes = 0, peak_cache_bytes = 0;  ///< KvCache::bytes of this tensor-parallel rank
                                                  ///< at the end, and the most after any step
};

/// Continues `prompt` [P] int64. Collective over the model's tensor-parallel ranks, which all get
/// the same tokens. Errors: Error(kUsage) on options out of range, or when prompt and tokens exceed
/// the model's positions; Error(kNumerics) on logits that are not finite.
Generation generate(CausalLM& model, const at::Tensor& prompt, const GenerationOptions& options);

}  // namespace drrl
