#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <ATen/ATen.h>

namespace drrl {

/// Decoder architectures of two families. Llama, Mistral and Qwen2: RMSNorm, RoPE, SwiGLU,
/// grouped-query attention; they differ in biases and defaults. GPT-2: LayerNorm, learned
/// positions, GELU, a KV head for every query head, biases everywhere.
enum class Architecture { kLlama, kMistral, kQwen2, kGpt2 };

/// "llama", "mistral", "qwen2", "gpt2": the `model_type` of Hugging Face Transformers.
const char* name(Architecture architecture) noexcept;

enum class Activation {
  kSwiglu,    ///< silu(gate) * up
  kGeluTanh,  ///< x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
  kGelu,      ///< x/2 (1 + erf(x / sqrt 2))
};

enum class RopeKind {
  kDefault,
  kLinear,
  kLlama3,
  kNone,  ///< positions are learned embeddings; every angle is 0
};

/// Rotary position encoding: `rope_theta` + `rope_scaling` of older files, or `rope_parameters` of
/// Transformers 5.
struct RopeConfig {
  RopeKind kind = RopeKind::kDefault;
  double theta = 10000.0;
  double factor = 1.0;            ///< linear and llama3: wavelengths are stretched by this
  double low_freq_factor = 1.0;   ///< llama3
  double high_freq_factor = 4.0;  ///< llama3
  double original_max_position_embeddings = 0.0;  ///< llama3: positions before the stretching
};

/// What a Hugging Face `config.json` says about a model. Every field that changes the result is
/// honoured or refused by name; what cannot be judged is noted in `warnings`. Defaults of absent
/// fields are those of Transformers.
struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;
  double norm_eps = 1e-6;
  double initializer_range = 0.02;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;  ///< q_proj, k_proj and v_proj have a bias (attention_bias of Llama;
                          ///< always in Qwen2)
  bool attention_output_bias = false;  ///< o_proj has a bias (attention_bias of Llama; never in
                                       ///< Qwen2)
  bool mlp_bias = false;               ///< gate_proj, up_proj and down_proj have a bias
  Activation activation = Activation::kSwiglu;
  bool scale_attention = true;  ///< scores are divided by sqrt(head_dim): scale_attn_weights of
                                ///< GPT-2
  bool scale_attention_by_layer = false;  ///< and by the number of the layer, from 1:
                                          ///< scale_attn_by_inverse_layer_idx of GPT-2
  RopeConfig rope;

  std::string dtype;  ///< "float32", "bfloat16", ... as the file states it; empty if it does not
  std::string original_json;          ///< the text that was read; `export_json` starts from it
  std::vector<std::string> warnings;  ///< one sentence each, for the start banner

  /// Reads `config.json` of a model directory, or the file itself.
  /// Errors: Error(kModel) that names the file, the field, its value and what is supported.
  static ModelConfig load(const std::filesystem::path& directory_or_file);

  /// Parses the text of a config.json. `origin` names it in messages.
  static ModelConfig parse(const std::string& text, const std::string& origin);

  /// The original JSON, field for field, with the weights' dtype set to `dtype` and
  /// tie_word_embeddings as it is.
  std::string export_json(at::ScalarType dtype) const;

  /// Query heads that share one key/value head.
  int64_t heads_per_group() const { return num_attention_heads / num_key_value_heads; }

  bool is_gpt2() const { return architecture == Architecture::kGpt2; }
  bool gated_mlp() const { return activation == Activation::kSwiglu; }

  /// What the scores of a layer (0-based) are multiplied by, beyond 1 / sqrt(head_dim).
  double score_factor(int64_t layer) const;

  /// Number of weights; tied embeddings are counted once.
  int64_t parameter_count() const;

  /// RoPE's inverse frequencies, fp32 [head_dim / 2] on the CPU, by the operations of Transformers'
  /// `modeling_rope_utils.py`, so that they are the same bits. The angle of position p in pair i is
  /// p * inverse_frequencies[i]; no kind supported here scales cos and sin. Zeros without RoPE.
  at::Tensor inverse_frequencies() const;
};

}  // namespace drrl
