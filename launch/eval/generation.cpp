#include "launch/eval/generation.h"

#include <cstdint>
#include <iostream>
#include <vector>

#include <gflags/gflags.h>

#include "core/error.h"
#include "launch/eval/totals.h"
#include "launch/options/flags.h"
#include "models/causal_lm/generate.h"

DEFINE_int64(generate, 0,
             "instead of evaluating, continue the first --prompt_tokens of --data by this many; 0: "
             "evaluate [tokens]");
DEFINE_int64(prompt_tokens, 64, "length of the prompt of --generate [tokens]");
DEFINE_double(temperature, 0,
              "of the draws of --generate, which --seed decides; 0: always the most likely token");
DEFINE_int64(top_k, 0, "draw only from this many most likely tokens; 0: from all [tokens]");

namespace drrl {
namespace {

std::vector<int64_t> to_vector(const at::Tensor& ids) {
  return {ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + ids.numel()};
}

}  // namespace

void check_generation(const ModelConfig& config, const TokenFile& file, const MeshShape& shape) {
  check(ErrorKind::kUsage, shape.dp == 1 && shape.cp == 1,
        "--generate continues one sequence, --dp=", shape.dp, " times --cp=", shape.cp,
        " processes cannot share it");
  check(ErrorKind::kUsage, FLAGS_prompt_tokens >= 1 && FLAGS_prompt_tokens <= file.tokens(),
        "--prompt_tokens=", FLAGS_prompt_tokens, " must lie in [1, ", file.tokens(),
        "], the tokens of ", FLAGS_data);
  check(ErrorKind::kUsage, FLAGS_prompt_tokens + FLAGS_generate <= config.max_position_embeddings,
        "--prompt_tokens=", FLAGS_prompt_tokens, " and --generate=", FLAGS_generate,
        " are more than ", config.max_position_embeddings, ", the positions of ", FLAGS_model);
  check(ErrorKind::kUsage, FLAGS_temperature >= 0 && FLAGS_top_k >= 0,
        "--temperature and --top_k must not be negative, got ", FLAGS_temperature, " and ",
        FLAGS_top_k);
}

nlohmann::ordered_json generation(CausalLM& model, LowRankController& controller,
                                  const TokenFile& file, const Mesh& mesh) {
  const at::Tensor prompt = file.read(0, FLAGS_prompt_tokens).contiguous();
  controller.take_statistics();
  const Generation made = generate(model, prompt,
                                   {.tokens = FLAGS_generate,
                                    .temperature = FLAGS_temperature,
                                    .top_k = FLAGS_top_k,
                                    .seed = FLAGS_seed});
  const AttentionStatistics a = reduce({.attention = controller.take_statistics()}, mesh).attention;
  auto bytes = at::tensor({made.cache_bytes, made.peak_cache_bytes}, at::kLong);
  mesh.tp().all_reduce(bytes);
  auto seconds = at::tensor({made.prefill_seconds, made.decode_seconds}, at::kDouble);
  mesh.tp().all_reduce(seconds, ReduceOp::kMax);
  const ModelConfig& config = model.config();
  const auto element = static_cast<int64_t>(c10::elementSize(model.options().dtype));
  const double prefill_s = seconds[0].item<double>(), decode_s = seconds[1].item<double>();
  nlohmann::ordered_json json = {
      {"prompt", to_vector(prompt)},
      {"generated", to_vector(made.tokens)},
      {"prompt_tokens", FLAGS_prompt_tokens},
      {"generated_tokens", FLAGS_generate},
      {"prefill_tokens_per_second", static_cast<double>(FLAGS_prompt_tokens) / prefill_s},
      {"decode_tokens_per_second", nullptr},
      {"kv_cache_bytes", bytes[0].item<int64_t>()},
      {"kv_cache_bytes_peak", bytes[1].item<int64_t>()},
      {"exact_kv_cache_bytes", 2 * config.num_hidden_layers * config.num_key_value_heads *
                                   config.head_dim * element * made.cached_tokens},
      {"decompositions", a.decompositions},
      {"basis_ms", a.basis_ms},
      {"attention_ms", a.attention_ms},
      {"far_pairs", a.decisions},
      {"exact_pairs", a.exact_pairs},
      {"mean_rank_qk", a.mean_rank_qk(config.head_dim)},
      {"mean_rank_v", a.mean_rank_v(config.head_dim)}};
  if (FLAGS_generate > 1) {
    json["decode_tokens_per_second"] = static_cast<double>(FLAGS_generate - 1) / decode_s;
  }
  return json;
}

void print_generation(const nlohmann::ordered_json& json) {
  std::cout << "tokens " << json["generated"].dump() << "\n"
            << "prefill " << json["prefill_tokens_per_second"].get<double>() << " tokens/s";
  if (!json["decode_tokens_per_second"].is_null()) {
    std::cout << ", decode " << json["decode_tokens_per_second"].get<double>() << " tokens/s";
  }
  const double exact = json["exact_kv_cache_bytes"].get<double>();
  std::cout << ", KV cache " << json["kv_cache_bytes"] << " bytes, "
            << json["kv_cache_bytes"].get<double>() / exact << " of exact keys and values ("
            << json["kv_cache_bytes_peak"].get<double>() / exact << " at most), mean ranks "
            << json["mean_rank_qk"].get<double>() << " / " << json["mean_rank_v"].get<double>()
            << "\n";
  print_exact_pairs(json);
}

}  // namespace drrl
