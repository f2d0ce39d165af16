#include "models/causal_lm/generate.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include <ATen/CPUGeneratorImpl.h>

#include "core/error.h"

namespace drrl {
namespace {

int64_t choose(const at::Tensor& logits, const GenerationOptions& options,
               at::Generator& generator) {
  check(ErrorKind::kNumerics, at::isfinite(logits).all().item<bool>(),
        "the logits of the next token are not finite");
  if (options.temperature == 0.0) {
    return logits.argmax().item<int64_t>();
  }
  const bool all = options.top_k == 0 || options.top_k >= logits.numel();
  const auto [values, ids] = at::topk(logits.to(at::kCPU, at::kDouble),
                                      all ? logits.numel() : options.top_k);
  const int64_t drawn = at::multinomial(at::softmax(values / options.temperature, 0), 1,
                                        /*replacement=*/false, generator)
                            .item<int64_t>();
  return ids[drawn].item<int64_t>();
}

}  // namespace

Generation generate(CausalLM& model, const at::Tensor& prompt, const GenerationOptions& options) {
  check(ErrorKind::kUsage, prompt.dim() == 1 && prompt.numel() > 0,
        "a prompt must be a non-empty [P], not ", prompt.sizes());
  check(ErrorKind::kUsage, options.tokens >= 1, "at least 1 token must be generated, not ",
        options.tokens);
  check(ErrorKind::kUsage, options.temperature >= 0.0 && std::isfinite(options.temperature),
        "the temperature must not be negative, got ", options.temperature);
  check(ErrorKind::kUsage, options.top_k >= 0, "top_k must not be negative, got ", options.top_k);

  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  auto generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  const auto cache = model.make_cache(prompt.numel() + options.tokens);
  Generation result;
  std::vector<int64_t> tokens;
  auto start = Clock::now();
  at::Tensor logits = model.extend(prompt.unsqueeze(0), *cache)[0];
  tokens.push_back(choose(logits, options, generator));
  result.prefill_seconds = seconds_since(start);
  result.peak_cache_bytes = cache->bytes();
  while (static_cast<int64_t>(tokens.size()) < options.tokens) {
    start = Clock::now();
    logits = model.extend(at::full({1, 1}, tokens.back(), at::kLong), *cache)[0];
    tokens.push_back(choose(logits, options, generator));
    result.decode_seconds += seconds_since(start);
    result.peak_cache_bytes = std::max(result.peak_cache_bytes, cache->bytes());
  }
  result.tokens = at::tensor(tokens, at::kLong);
  result.cached_tokens = cache->length();
  result.cache_bytes = cache->bytes();
  return result;
}

}  // namespace drrl
