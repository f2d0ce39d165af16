#include "models/causal_lm/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/io/file_io.h"

namespace drrl {
namespace {

using Json = nlohmann::json;
constexpr ErrorKind kKind = ErrorKind::kModel;

struct ArchitectureDefaults {
  Architecture architecture;
  std::string_view model_type;
  std::string_view class_name;
  int64_t num_key_value_heads;  // 0: as many as query heads
  int64_t max_position_embeddings;
};

// The defaults of Transformers' configuration classes, for fields that a config.json leaves out.
constexpr std::array kArchitectures = {
    ArchitectureDefaults{Architecture::kLlama, "llama", "LlamaForCausalLM", 0, 2048},
    ArchitectureDefaults{Architecture::kMistral, "mistral", "MistralForCausalLM", 8, 131072},
    ArchitectureDefaults{Architecture::kQwen2, "qwen2", "Qwen2ForCausalLM", 32, 32768},
    ArchitectureDefaults{Architecture::kGpt2, "gpt2", "GPT2LMHeadModel", 0, 1024},
};
constexpr int64_t
    kSlidingWindow = 4096;  // of Mistral and, when use_sliding_window is true, of Qwen2

// Sizes beyond those of any model. Below them the number of weights fits 63 bits.
constexpr int64_t kMostLayers = 1 << 14;
constexpr int64_t kMostVocabulary = 1 << 28;
constexpr int64_t kMostHidden = 1 << 20;
constexpr int64_t kMostIntermediate = 1 << 22;
constexpr int64_t kMostHeads = 1 << 16;
constexpr int64_t kMostQueryRows = 1 << 22;  // heads times head_dim

// Fields that change neither logits nor the training loss: tokens for generation, bookkeeping of
// Transformers and of conversion tools.
const std::set<std::string_view> kWithoutEffect = {
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    "cls_token_id",
    "mask_token_id",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "is_encoder_decoder",
    "is_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "tokenizer_class",
    "prefix",
    "pruned_heads",
    "chunk_size_feed_forward",
    "_attn_implementation_autoset",
    "_attn_implementation",
    "attn_implementation",
    "_commit_hash",
    "is_llama_config",
    "transformers.js_config",
    "max_length",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "early_stopping",
    "num_return_sequences",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "encoder_no_repeat_ngram_size",
    "output_scores",
    "return_dict_in_generate",
    "torchscript",
    "use_bfloat16",
    "tf_legacy_loss",
    "max_window_layers",
    "n_ctx",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
};

// A JSON value as messages show it.
std::string shown(const Json& value, size_t longest = 200) {
  const std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() <= longest ? text : text.substr(0, longest) + "...";
}

// The fields of one JSON object: typed access whose messages name file, field and value, and a
// record of what was looked at.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  const std::string& where() const { return where_; }

  /// The value; null and absent are the same, as in Transformers.
  const Json* find(const std::string& field) {
    seen_.insert(field);
    const auto found = object_.find(field);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  /// As it stands in the file, null included; nullptr if absent.
  const Json* find_raw(const std::string& field) {
    seen_.insert(field);
    const auto found = object_.find(field);
    return found == object_.end() ? nullptr : &*found;
  }

  [[noreturn]] void refuse(const std::string& field, const std::string& expectation) const {
    raise(kKind, where_, ": ", field, " is ",
          object_.contains(field) ? shown(object_[field]) : "absent", "; ", expectation);
  }

  /// An integer from 1 to `most`.
  std::optional<int64_t> integer(const std::string& field, int64_t most = INT32_MAX) {
    const Json* value = find(field);
    if (value == nullptr) {
      return std::nullopt;
    }
    const bool good = value->is_number_integer() &&
                      !(value->is_number_unsigned() &&
                        value->get<uint64_t>() > static_cast<uint64_t>(most)) &&
                      value->get<int64_t>() >= 1 && value->get<int64_t>() <= most;
    if (!good) {
      refuse(field, c10::str("expected an integer from 1 to ", most));
    }
    return value->get<int64_t>();
  }

  int64_t required_integer(const std::string& field, int64_t most) {
    const auto value = integer(field, most);
    check(kKind, value.has_value(), where_, " has no field \"", field, "\"");
    return *value;
  }

  std::optional<double> number(const std::string& field, double above) {
    const Json* value = find(field);
    if (value == nullptr) {
      return std::nullopt;
    }
    if (!value->is_number() || !std::isfinite(value->get<double>()) ||
        !(value->get<double>() > above)) {
      refuse(field, c10::str("expected a number above ", above));
    }
    return value->get<double>();
  }

  double required_number(const std::string& field, double above) {
    const auto value = number(field, above);
    check(kKind, value.has_value(), where_, " has no field \"", field, "\"");
    return *value;
  }

  bool boolean(const std::string& field, bool otherwise) {
    const Json* value = find(field);
    if (value == nullptr) {
      return otherwise;
    }
    if (!value->is_boolean()) {
      refuse(field, "expected true or false");
    }
    return value->get<bool>();
  }

  std::optional<std::string> text(const std::string& field) {
    const Json* value = find(field);
    if (value == nullptr) {
      return std::nullopt;
    }
    if (!value->is_string()) {
      refuse(field, "expected a string");
    }
    return value->get<std::string>();
  }

  /// Fields with a value that nobody looked at.
  std::vector<std::string> unseen() const {
    std::vector<std::string> result;
    for (const auto& [field, value] : object_.items()) {
      if (!value.is_null() && !seen_.contains(field)) {
        result.push_back(field);
      }
    }
    return result;
  }

 private:
  const Json& object_;
  std::string where_;
  std::set<std::string> seen_;
};

const ArchitectureDefaults& read_architecture(Fields& fields) {
  constexpr const char* kSupported =
      "supported are llama (LlamaForCausalLM), mistral (MistralForCausalLM), qwen2 "
      "(Qwen2ForCausalLM) and gpt2 (GPT2LMHeadModel)";
  const auto model_type = fields.text("model_type");
  check(kKind, model_type.has_value(), fields.where(), " has no field \"model_type\"; ",
        kSupported);
  for (const auto& defaults : kArchitectures) {
    if (defaults.model_type != *model_type) {
      continue;
    }
    if (const Json* classes = fields.find("architectures")) {
      const bool known = classes->is_array() && classes->size() == 1 &&
                         classes->front() == defaults.class_name;
      if (!known) {
        fields.refuse("architectures", c10::str("with model_type \"", *model_type, "\", [\"",
                                                defaults.class_name, "\"] is supported"));
      }
    }
    return defaults;
  }
  fields.refuse("model_type", kSupported);
}

RopeConfig read_rope(Fields& fields, const std::string& origin,
                     std::vector<std::string>& warnings) {
  // Transformers: `rope_scaling`, if it is there and not empty, else `rope_parameters`; its own
  // `rope_theta`, else the one beside it, else 10000.
  const Json* scaling = fields.find("rope_scaling");
  const Json* parameters = fields.find("rope_parameters");
  const auto outer_theta = fields.number("rope_theta", 0.0);
  const auto outer_positions = fields.integer("original_max_position_embeddings");
  const auto outer_partial = fields.number("partial_rotary_factor", 0.0);
  for (const char* field : {"rope_scaling", "rope_parameters"}) {
    if (const Json* value = fields.find(field); value != nullptr && !value->is_object()) {
      fields.refuse(field, "expected an object");
    }
  }
  for (const char* field : {"rope_scaling", "rope_parameters"}) {
    const Json* value = fields.find(field);
    if (value == nullptr) {
      continue;
    }
    for (const auto& [key, inside] : value->items()) {
      if (inside.is_object()) {
        fields.refuse(field,
                      c10::str("parameters for one type of layers (", quoted(key),
                               ") are not supported, expected one set of them for all layers"));
      }
    }
  }
  const bool old_spelling = scaling != nullptr && !scaling->empty();
  const Json nothing = Json::object();
  Fields inner(old_spelling            ? *scaling
               : parameters != nullptr ? *parameters
                                       : nothing,
               origin + (old_spelling ? ": rope_scaling" : ": rope_parameters"));

  RopeConfig rope;
  if (old_spelling && parameters != nullptr && !parameters->empty() && *scaling != *parameters) {
    warnings.push_back(c10::str("rope_scaling ", shown(*scaling), " and rope_parameters ",
                                shown(*parameters),
                                " are not the same; rope_scaling is used, as Transformers does"));
  }
  const auto inner_theta = inner.number("rope_theta", 0.0);
  rope.theta = inner_theta.value_or(outer_theta.value_or(10000.0));
  const auto given_twice = [&](const char* field, const auto& outer_value, const auto& inner_value,
                               const char* used) {
    if (outer_value && inner_value && *outer_value != *inner_value) {
      warnings.push_back(c10::str(field, " is given twice, as ", *outer_value, " and in ",
                                  old_spelling ? "rope_scaling" : "rope_parameters", " as ",
                                  *inner_value, "; the ", used, " is used, as Transformers does"));
    }
  };
  given_twice("rope_theta", outer_theta, inner_theta, "latter");
  const auto inner_partial = inner.number("partial_rotary_factor", 0.0);
  if (inner_partial.value_or(1.0) != 1.0) {
    inner.refuse("partial_rotary_factor", "only 1 is supported");
  }
  given_twice("partial_rotary_factor", outer_partial, inner_partial, "latter");
  if (!inner_partial && outer_partial.value_or(1.0) != 1.0) {
    fields.refuse("partial_rotary_factor", "only 1 is supported");
  }

  const auto old_kind = inner.text("type");
  const auto new_kind = inner.text("rope_type");
  const std::string kind = new_kind.value_or(old_kind.value_or("default"));
  if (old_kind && new_kind && *old_kind != *new_kind) {
    warnings.push_back(c10::str(old_spelling ? "rope_scaling" : "rope_parameters", " has the type ",
                                quoted(*old_kind), " and the rope_type ", quoted(*new_kind),
                                "; the latter is used, as Transformers does"));
  }
  if (kind == "default") {
    rope.kind = RopeKind::kDefault;
  } else if (kind == "linear") {
    rope.kind = RopeKind::kLinear;
    rope.factor = inner.required_number("factor", 0.0);
  } else if (kind == "llama3") {
    rope.kind = RopeKind::kLlama3;
    rope.factor = inner.required_number("factor", 0.0);
    rope.low_freq_factor = inner.required_number("low_freq_factor", 0.0);
    rope.high_freq_factor = inner.required_number("high_freq_factor", 0.0);
    if (!(rope.high_freq_factor > rope.low_freq_factor)) {
      inner.refuse("high_freq_factor",
                   c10::str("expected more than low_freq_factor, ", rope.low_freq_factor));
    }
    const auto inner_positions = inner.integer("original_max_position_embeddings");
    given_twice("original_max_position_embeddings", outer_positions, inner_positions, "former");
    const int64_t positions = outer_positions ? *outer_positions
                              : inner_positions
                                  ? *inner_positions
                                  : fields.integer("max_position_embeddings").value_or(0);
    check(kKind, positions > 0, inner.where(),
          " has no field \"original_max_position_embeddings\"");
    rope.original_max_position_embeddings = static_cast<double>(positions);
  } else {
    inner.refuse(old_kind && !new_kind ? "type" : "rope_type",
                 "supported are \"default\", \"linear\" and \"llama3\" (dynamic, yarn, longrope, "
                 "su and mrope change with the "
                 "length of the text "
                 "or scale the attention)");
  }
  for (const std::string& field : inner.unseen()) {
    warnings.push_back("field " + field + " of " +
                       (old_spelling ? "rope_scaling" : "rope_parameters") +
                       " is not known and was ignored");
  }
  return rope;
}

void read_biases(Fields& fields, ModelConfig& config) {
  const auto fixed = [&](const char* field, bool value) {
    if (fields.boolean(field, value) != value) {
      fields.refuse(field, c10::str(name(config.architecture),
                                    value ? " models always have it" : " models never have it"));
    }
    return value;
  };
  switch (config.architecture) {
    case Architecture::kLlama:
      config.qkv_bias = config.attention_output_bias = fields.boolean("attention_bias", false);
      config.mlp_bias = fields.boolean("mlp_bias", false);
      break;
    case Architecture::kMistral:
      config.qkv_bias = config.attention_output_bias = fixed("attention_bias", false);
      config.mlp_bias = fixed("mlp_bias", false);
      break;
    case Architecture::kQwen2:
      config.qkv_bias = fixed("attention_bias", true);
      config.attention_output_bias = false;
      config.mlp_bias = fixed("mlp_bias", false);
      break;
    case Architecture::kGpt2:
      config.qkv_bias = config.attention_output_bias = config.mlp_bias = true;
      break;
  }
}

// A window that is as long as the longest text changes nothing; a shorter one is refused.
void check_sliding_window(Fields& fields, const ModelConfig& config) {
  const auto refuse_short = [&](int64_t window) {
    if (window < config.max_position_embeddings) {
      fields.refuse("sliding_window", c10::str("sliding-window attention over ", window, " of ",
                                               config.max_position_embeddings,
                                               " positions is not supported; null is"));
    }
  };
  switch (config.architecture) {
    case Architecture::kLlama:
    case Architecture::kGpt2: break;  // they have no such field: it becomes a warning
    case Architecture::kMistral: {
      const auto window = fields.integer("sliding_window");
      // Explicit null switches it off; Transformers' default for an absent field is a window.
      const Json* present = fields.find_raw("sliding_window");
      if (window || present == nullptr) {
        refuse_short(window.value_or(kSlidingWindow));
      }
      break;
    }
    case Architecture::kQwen2: {
      const bool used = fields.boolean("use_sliding_window", false);
      const auto window = fields.integer("sliding_window");
      const Json* present = fields.find_raw("sliding_window");
      if (used && (window || present == nullptr)) {
        refuse_short(window.value_or(kSlidingWindow));
      }
      break;
    }
  }
  if (const Json* types = fields.find("layer_types")) {
    const bool all_full = types->is_array() &&
                          std::all_of(types->begin(), types->end(),
                                      [](const Json& type) { return type == "full_attention"; });
    if (!all_full) {
      fields.refuse("layer_types", "every layer must be \"full_attention\"");
    }
  }
}

void read_llama(Fields& fields, ModelConfig& config, const ArchitectureDefaults& defaults) {
  config.hidden_size = fields.required_integer("hidden_size", kMostHidden);
  config.intermediate_size = fields.required_integer("intermediate_size", kMostIntermediate);
  config.num_hidden_layers = fields.required_integer("num_hidden_layers", kMostLayers);
  config.num_attention_heads = fields.required_integer("num_attention_heads", kMostHeads);
  // An explicit null means "as many as query heads" everywhere; only an absent field has a default
  // of its own.
  const int64_t absent_groups = defaults.num_key_value_heads == 0 ? config.num_attention_heads
                                                                  : defaults.num_key_value_heads;
  const bool null_groups = fields.find_raw("num_key_value_heads") != nullptr;
  config.num_key_value_heads = fields.integer("num_key_value_heads", kMostHeads)
                                   .value_or(null_groups ? config.num_attention_heads
                                                         : absent_groups);
  config.max_position_embeddings = fields.integer("max_position_embeddings")
                                       .value_or(defaults.max_position_embeddings);
  if (config.num_attention_heads % config.num_key_value_heads != 0) {
    fields.refuse(
        "num_key_value_heads",
        c10::str(config.num_key_value_heads, " groups cannot share ", config.num_attention_heads,
                 " query heads (num_attention_heads) evenly"));
  }
  const auto head_dim = fields.integer("head_dim", kMostQueryRows / config.num_attention_heads);
  if (!head_dim && config.hidden_size % config.num_attention_heads != 0) {
    fields.refuse("hidden_size",
                  c10::str("without head_dim it must be a multiple of num_attention_heads, ",
                           config.num_attention_heads));
  }
  config.head_dim = head_dim.value_or(config.hidden_size / config.num_attention_heads);
  check(kKind, config.head_dim % 2 == 0, fields.where(), ": head_dim is ", config.head_dim,
        "; rotary position encoding needs an even number");

  config.norm_eps = fields.number("rms_norm_eps", 0.0).value_or(1e-6);
  config.rope = read_rope(fields, fields.where(), config.warnings);
  check_sliding_window(fields, config);

  const std::string activation = fields.text("hidden_act").value_or("silu");
  if (activation != "silu" && activation != "swish") {
    fields.refuse("hidden_act", "\"silu\" is supported");
  }
  if (fields.number("attention_dropout", -1e-300).value_or(0.0) != 0.0) {
    fields.refuse("attention_dropout",
                  "dropout inside attention is not supported; set it to 0 to train without");
  }
  if (fields.integer("pretraining_tp").value_or(1) != 1) {
    config.warnings.push_back(
        "pretraining_tp only changes the order of rounding and was ignored, as in Transformers");
  }
}

void read_gpt2(Fields& fields, ModelConfig& config) {
  // Transformers takes these for the fields of the same meaning; a file that has both could mean
  // either.
  for (const auto& [general, own] :
       {std::pair("hidden_size", "n_embd"), std::pair("num_attention_heads", "n_head"),
        std::pair("num_hidden_layers", "n_layer"),
        std::pair("max_position_embeddings", "n_positions")}) {
    if (fields.find(general) != nullptr) {
      fields.refuse(general, c10::str("GPT-2 models say ", own));
    }
  }
  config.hidden_size = fields.required_integer("n_embd", kMostHidden);
  config.num_hidden_layers = fields.required_integer("n_layer", kMostLayers);
  config.num_attention_heads = config.num_key_value_heads = fields.required_integer("n_head",
                                                                                    kMostHeads);
  config.intermediate_size = fields.integer("n_inner", kMostIntermediate)
                                 .value_or(4 * config.hidden_size);
  config.max_position_embeddings = fields.integer("n_positions").value_or(1024);
  if (config.hidden_size % config.num_attention_heads != 0) {
    fields.refuse("n_embd",
                  c10::str("expected a multiple of n_head, ", config.num_attention_heads));
  }
  config.head_dim = config.hidden_size / config.num_attention_heads;
  check(kKind, config.head_dim % 2 == 0, fields.where(), ": n_embd / n_head is ", config.head_dim,
        "; an even number is supported");
  config.norm_eps = fields.number("layer_norm_epsilon", 0.0).value_or(1e-5);
  config.rope.kind = RopeKind::kNone;
  config.scale_attention = fields.boolean("scale_attn_weights", true);
  config.scale_attention_by_layer = fields.boolean("scale_attn_by_inverse_layer_idx", false);

  const std::string activation = fields.text("activation_function").value_or("gelu_new");
  if (activation == "gelu_new" || activation == "gelu_pytorch_tanh" || activation == "gelu_fast") {
    config.activation = Activation::kGeluTanh;  // three spellings of one function
  } else if (activation == "gelu") {
    config.activation = Activation::kGelu;
  } else {
    fields.refuse("activation_function",
                  "supported are \"gelu_new\", \"gelu_pytorch_tanh\", \"gelu_fast\" and \"gelu\"");
  }
  if (fields.boolean("add_cross_attention", false)) {
    fields.refuse("add_cross_attention", "cross-attention is not supported");
  }
  if (fields.boolean("reorder_and_upcast_attn", false)) {
    config.warnings.push_back(
        "reorder_and_upcast_attn only changes the rounding of mixed precision and was ignored, as "
        "in Transformers' SDPA");
  }
  const double residual = fields.number("resid_pdrop", -1e-300).value_or(0.1);
  const double embedding = fields.number("embd_pdrop", -1e-300).value_or(0.1);
  const double attention = fields.number("attn_pdrop", -1e-300).value_or(0.1);
  if (residual != 0.0 || embedding != 0.0 || attention != 0.0) {
    config.warnings.push_back(c10::str("training is without dropout (resid_pdrop ", residual,
                                       ", embd_pdrop ", embedding, ", attn_pdrop ", attention,
                                       "); evaluation has none anyway"));
  }
}

}  // namespace

const char* name(Architecture architecture) noexcept {
  switch (architecture) {
    case Architecture::kLlama: return "llama";
    case Architecture::kMistral: return "mistral";
    case Architecture::kQwen2: return "qwen2";
    case Architecture::kGpt2: return "gpt2";
  }
  return "?";
}

ModelConfig ModelConfig::load(const std::filesystem::path& directory_or_file) {
  check(kKind, path_exists(directory_or_file, kKind), directory_or_file,
        ": No such file or folder; models are Hugging Face folders on this machine ('hf download "
        "NAME --local-dir FOLDER' gets one)");
  const bool is_directory = is_folder(directory_or_file, kKind);
  const std::filesystem::path path = is_directory ? directory_or_file / "config.json"
                                                  : directory_or_file;
  check(kKind, is_directory || path.extension() != ".safetensors", path,
        " is a file of weights, expected the folder that it is in");
  return parse(read_text(path, kKind), path.string());
}

ModelConfig ModelConfig::parse(const std::string& text, const std::string& origin) {
  check_nesting(text, origin, kKind);
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::exception& error) {
    raise(kKind, origin, " is not valid JSON: ", error.what());
  }
  check(kKind, json.is_object(), origin, " is not a JSON object");
  Fields fields(json, origin);

  ModelConfig config;
  config.original_json = text;
  const ArchitectureDefaults& defaults = read_architecture(fields);
  config.architecture = defaults.architecture;
  if (fields.find("quantization_config") != nullptr) {
    fields.refuse(
        "quantization_config",
        "quantized weights are not supported; use the model's fp32, bf16 or fp16 weights");
  }
  if (fields.find("auto_map") != nullptr) {
    fields.refuse("auto_map", "models that bring their own code are not supported");
  }
  if (!fields.boolean("is_causal", true)) {
    fields.refuse("is_causal", "attention in both directions is not supported, only true is");
  }
  if (fields.find("per_layer_config") != nullptr) {
    fields.refuse("per_layer_config", "layers that differ from each other are not supported");
  }
  config.vocab_size = fields.required_integer("vocab_size", kMostVocabulary);
  config.initializer_range = fields.number("initializer_range", -1e-300).value_or(0.02);
  config.tie_word_embeddings = fields.boolean("tie_word_embeddings", config.is_gpt2());
  read_biases(fields, config);
  if (config.is_gpt2()) {
    read_gpt2(fields, config);
  } else {
    read_llama(fields, config, defaults);
  }
  const auto torch_dtype = fields.text("torch_dtype");
  config.dtype = fields.text("dtype").value_or(torch_dtype.value_or(""));

  for (const std::string& field : fields.unseen()) {
    const Json& value = json[field];
    if (!kWithoutEffect.contains(field) && value != false) {
      config.warnings.push_back("field " + field + " = " + shown(value, 80) + " is not known for " +
                                name(config.architecture) + " models and was ignored");
    }
  }
  return config;
}

namespace {
bool fields_tie(const nlohmann::ordered_json& json, bool otherwise) {
  const auto found = json.find("tie_word_embeddings");
  return found == json.end() || found->is_null() ? otherwise : found->get<bool>();
}
}  // namespace

std::string ModelConfig::export_json(at::ScalarType weights) const {
  auto json = nlohmann::ordered_json::parse(original_json);
  const char* text = weights == at::kFloat      ? "float32"
                     : weights == at::kBFloat16 ? "bfloat16"
                     : weights == at::kHalf     ? "float16"
                                                : nullptr;
  check(ErrorKind::kInternal, text != nullptr, "models are exported as fp32, bf16 or fp16, not ",
        c10::toString(weights));
  // Older versions of Transformers read only torch_dtype; newer ones read both.
  const bool newer = json.contains("dtype");
  json[newer ? "dtype" : "torch_dtype"] = text;
  if (newer && json.contains("torch_dtype")) {
    json["torch_dtype"] = text;
  }
  if (fields_tie(json, is_gpt2()) != tie_word_embeddings) {
    json["tie_word_embeddings"] = tie_word_embeddings;
  }
  return json.dump(2) + "\n";
}

double ModelConfig::score_factor(int64_t layer) const {
  const double factor = scale_attention ? 1.0 : std::sqrt(static_cast<double>(head_dim));
  return scale_attention_by_layer ? factor / static_cast<double>(layer + 1) : factor;
}

int64_t ModelConfig::parameter_count() const {
  const int64_t q = num_attention_heads * head_dim;
  const int64_t kv = num_key_value_heads * head_dim;
  const int64_t attention = hidden_size * (2 * q + 2 * kv) + (qkv_bias ? q + 2 * kv : 0) +
                            (attention_output_bias ? hidden_size : 0);
  const int64_t into_mlp = gated_mlp() ? 2 : 1;
  const int64_t mlp = (into_mlp + 1) * hidden_size * intermediate_size +
                      (mlp_bias ? into_mlp * intermediate_size + hidden_size : 0);
  const int64_t norm = hidden_size * (is_gpt2() ? 2 : 1);
  const int64_t embeddings = hidden_size * (vocab_size * (tie_word_embeddings ? 1 : 2) +
                                            (is_gpt2() ? max_position_embeddings : 0));
  return embeddings + num_hidden_layers * (attention + mlp + 2 * norm) + norm;
}

at::Tensor ModelConfig::inverse_frequencies() const {
  const at::Tensor exponents = at::arange(0, head_dim, 2, at::kLong).to(at::kFloat) /
                               at::Scalar(head_dim);
  at::Tensor frequencies = at::pow(at::Scalar(rope.theta), exponents).reciprocal();
  switch (rope.kind) {
    case RopeKind::kDefault: return frequencies;
    case RopeKind::kNone: return frequencies.zero_();
    case RopeKind::kLinear: return frequencies.div_(rope.factor);
    case RopeKind::kLlama3: break;
  }
  const double positions = rope.original_max_position_embeddings;
  const double longest = positions / rope.low_freq_factor;
  const double shortest = positions / rope.high_freq_factor;
  // Python's number / tensor is tensor.reciprocal() * number, which rounds unlike a division.
  const at::Tensor wavelengths = frequencies.reciprocal() * (2 * std::numbers::pi);
  const at::Tensor scaled = at::where(wavelengths > longest, frequencies / rope.factor,
                                      frequencies);
  const at::Tensor smooth = (wavelengths.reciprocal() * positions - rope.low_freq_factor) /
                            (rope.high_freq_factor - rope.low_freq_factor);
  const at::Tensor blended = (1.0 - smooth) * scaled / rope.factor + smooth * scaled;
  const at::Tensor medium = at::logical_and(wavelengths >= shortest, wavelengths <= longest);
  return at::where(medium, blended, scaled);
}

}  // namespace drrl
