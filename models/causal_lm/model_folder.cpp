#include "models/causal_lm/model_folder.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <optional>
#include <regex>
#include <set>

#include "core/error.h"
#include "models/causal_lm/weights.h"

namespace drrl {
namespace {

constexpr ErrorKind kKind = ErrorKind::kModel;
constexpr const char* kHead = "lm_head.weight";

std::string embedding_name(const ModelConfig& config) {
  return std::string(parameter_names(config).embedding) + ".weight";
}

// The fields of config.json that decide a tensor's shape, with their values.
std::string deciding_fields(const ModelConfig& config, const std::string& name) {
  const bool gpt2 = config.is_gpt2();
  const auto field = [&](const char* llama, const char* gpt2_name, int64_t value) {
    return c10::str(gpt2 ? gpt2_name : llama, " = ", value);
  };
  const std::string hidden = field("hidden_size", "n_embd", config.hidden_size);
  const ParameterNames& names = parameter_names(config);
  if (name == kHead ||
      name.ends_with(std::string(names.embedding).substr(std::string(names.base).size()) +
                     ".weight")) {
    return c10::str("vocab_size = ", config.vocab_size, ", ", hidden);
  }
  if (name.ends_with("wpe.weight")) {
    return c10::str("n_positions = ", config.max_position_embeddings, ", ", hidden);
  }
  if (name.find("mlp.") != std::string::npos) {
    return field("intermediate_size", "n_inner", config.intermediate_size) + ", " + hidden;
  }
  if (name.find("attn.") != std::string::npos) {
    return gpt2 ? hidden
                : c10::str("num_attention_heads = ", config.num_attention_heads,
                           ", num_key_value_heads = ", config.num_key_value_heads,
                           ", head_dim = ", config.head_dim, ", ", hidden);
  }
  return hidden;
}

// Tensors that old files hold although the model computes them: angles of RoPE, and GPT-2's causal
// masks.
bool is_frequency_table(const ModelConfig& config, const std::string& name) {
  return !config.is_gpt2() && name.ends_with(".rotary_emb.inv_freq");
}
bool is_constant(const ModelConfig& config, const std::string& name) {
  return is_frequency_table(config, name) ||
         (config.is_gpt2() &&
          (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")));
}

// Whether a config ties the head to the embedding and the weights hold both.
bool holds_tied_head(const ModelConfig& config, const WeightStore& weights) {
  return config.tie_word_embeddings && weights.contains(kHead) &&
         stored_name(config, weights, embedding_name(config)) != kHead;
}

bool head_differs(const ModelConfig& config, const WeightStore& weights) {
  constexpr int64_t kRows = 4096;  // read at a time
  const std::string embedding = stored_name(config, weights, embedding_name(config));
  for (int64_t row = 0; row < config.vocab_size; row += kRows) {
    const int64_t rows = std::min(kRows, config.vocab_size - row);
    if (!weights.slice(kHead, 0, row, rows).equal(weights.slice(embedding, 0, row, rows))) {
      return true;
    }
  }
  return false;
}

std::string first_and_count(const std::vector<std::string>& names) {
  return names.size() == 1 ? names.front()
                           : c10::str(names.front(), " and ", names.size() - 1, " more");
}

// Names what the folder holds beside what is read.
void note_unread(const std::filesystem::path& folder, const WeightStore& weights,
                 ModelConfig& config) {
  const std::string file = weights.path().filename().string();
  std::vector<std::string> constants;
  std::optional<std::string> other_table;
  const at::Tensor frequencies = config.inverse_frequencies();
  for (const std::string& name : weights.names()) {
    if (!is_constant(config, name)) {
      continue;
    }
    constants.push_back(name);
    const bool like_ours = !is_frequency_table(config, name) ||
                           (weights.shape(name) == frequencies.sizes() &&
                            at::allclose(weights.tensor(name), frequencies, 2e-2,
                                         0));  // it may be in bf16
    if (!like_ours && !other_table) {
      other_table = name;
    }
  }
  if (other_table) {
    config.warnings.push_back(c10::str(
        file, ": ", *other_table,
        " contradicts the rope fields of config.json, which are used, as in Transformers"));
  } else if (!constants.empty()) {
    config.warnings.push_back(
        c10::str(file, " holds constants that the model computes itself and are not read: ",
                 first_and_count(constants)));
  }
  if (file == "model.safetensors" && path_exists(folder / "model.safetensors.index.json", kKind)) {
    config.warnings.push_back(
        "model.safetensors is read, model.safetensors.index.json beside it and its shards are not, "
        "as in Transformers");
  }
}

bool is_weight_file(const std::string& name) {
  static const std::regex pattern(
      R"((model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin))"
      R"(|model\.safetensors\.index\.json|pytorch_model\.bin(\.index\.json)?)");
  return std::regex_match(name, pattern);
}

std::optional<int64_t> number_in(const std::filesystem::path& path) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? std::optional(value) : std::nullopt;  // "max" is no number
}

}  // namespace

std::string stored_name(const ModelConfig& config, const WeightStore& weights,
                        const std::string& name) {
  if (weights.contains(name)) {
    return name;
  }
  const std::string base = parameter_names(config).base;
  if (name.starts_with(base) && weights.contains(name.substr(base.size()))) {
    return name.substr(base.size());
  }
  return config.tie_word_embeddings && name == embedding_name(config) && weights.contains(kHead)
             ? kHead
             : name;
}

void check_weights(const ModelConfig& config, const WeightStore& weights) {
  const auto names = weights.names();
  check(kKind, config.num_hidden_layers <= static_cast<int64_t>(names.size()), weights.path(),
        " holds ", names.size(), " tensors, fewer than the layers that config.json calls for: ",
        config.is_gpt2() ? "n_layer" : "num_hidden_layers", " = ", config.num_hidden_layers);
  std::set<std::string> used;
  const auto fits = [&](const std::string& name, const std::vector<int64_t>& shape) {
    check(kKind, weights.shape(name) == shape, weights.path(), ": tensor ", name, " has shape ",
          at::IntArrayRef(weights.shape(name)), ", config.json says ", at::IntArrayRef(shape), " (",
          deciding_fields(config, name), ")");
    check(kKind, at::isFloatingType(weights.dtype(name)), weights.path(), ": tensor ", name,
          " holds ", c10::toString(weights.dtype(name)),
          "; weights are read in fp32, bf16, fp16 or fp64, quantized ones are not supported");
    used.insert(name);
  };
  for (const ParameterLayout& layout : parameter_layouts(config, 1, 0)) {
    for (const WeightPart& part : layout.parts) {
      const std::string name = stored_name(config, weights, part.name);
      const bool in_layer = name.starts_with(parameter_names(config).layers);
      check(kKind, weights.contains(name), weights.path(), ": no tensor ", part.name,
            ", which config.json calls for",
            in_layer ? c10::str(" (", config.is_gpt2() ? "n_layer" : "num_hidden_layers", " = ",
                                config.num_hidden_layers, ")")
                     : std::string());
      fits(name, part.shape);
    }
  }
  if (holds_tied_head(config, weights)) {
    fits(kHead, {config.vocab_size, config.hidden_size});
  }
  for (const std::string& name : names) {
    check(kKind, used.contains(name) || is_constant(config, name), weights.path(), ": tensor ",
          name, " has no place in the model that config.json describes");
  }
}

ModelConfig load_model_config(const std::filesystem::path& folder) {
  ModelConfig config = ModelConfig::load(folder);
  check(kKind, !path_exists(folder / "adapter_config.json", kKind), folder / "adapter_config.json",
        ": adapters are not applied; merge it into the weights (merge_and_unload of PEFT), or "
        "remove it to use the model without");
  const WeightStore weights = WeightStore::open(folder);
  check_weights(config, weights);
  if (holds_tied_head(config, weights) && head_differs(config, weights)) {
    config.tie_word_embeddings = false;
    config.warnings.push_back(
        c10::str("config.json says tie_word_embeddings = true, but lm_head.weight in ",
                 weights.path().filename().string(),
                 " differs from the embedding: they are not tied, as in Transformers, and an "
                 "export says so"));
  }
  note_unread(folder, weights, config);
  return config;
}

void check_tied_head(const ModelConfig& config, const WeightStore& weights) {
  check(kKind, !holds_tied_head(config, weights) || !head_differs(config, weights), weights.path(),
        ": lm_head.weight differs from the embedding, to which tie_word_embeddings = true ties it; "
        "load_model_config reads such a config.json as not tied");
}

const std::vector<std::string>& companion_names() {
  static const std::vector<std::string> names = {"tokenizer.json",
                                                 "tokenizer.model",
                                                 "tekken.json",
                                                 "tokenizer_config.json",
                                                 "special_tokens_map.json",
                                                 "added_tokens.json",
                                                 "vocab.json",
                                                 "merges.txt",
                                                 "chat_template.jinja",
                                                 "chat_template.json",
                                                 "generation_config.json"};
  return names;
}

void remove_stale_files(const std::filesystem::path& folder, const std::vector<std::string>& kept) {
  std::error_code error;
  std::vector<std::filesystem::path> stale;
  for (std::filesystem::directory_iterator item(folder, error), end; !error && item != end;
       item.increment(error)) {
    const std::string name = item->path().filename().string();
    const bool companion = std::find(companion_names().begin(), companion_names().end(), name) !=
                           companion_names().end();
    if (is_weight_file(name) ||
        (companion && std::find(kept.begin(), kept.end(), name) == kept.end())) {
      stale.push_back(item->path());
    }
  }
  check(ErrorKind::kStorage, !error, "cannot list ", folder, ": ", error.message());
  for (const auto& path : stale) {
    std::filesystem::remove(path, error);
    check(ErrorKind::kStorage, !error, "cannot remove ", path,
          ", which belongs to another model than the one exported there: ", error.message());
  }
}

int64_t free_memory() {
  int64_t available = -1, swap = 0;
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    long long kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %lld kB", &kib) == 1) {
      available = kib * 1024;
    } else if (std::sscanf(line.c_str(), "SwapFree: %lld kB", &kib) == 1) {
      swap = kib * 1024;
    }
  }
  int64_t bytes = available < 0 ? INT64_MAX : available + swap;
  // Limits of the process's control group and those above it, of version 2 and 1.
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const bool second = line.starts_with("0::");
    if (!second && line.find(":memory:") == std::string::npos) {
      continue;
    }
    const std::filesystem::path root = second ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    std::filesystem::path group = line.substr(line.rfind(':') + 1);
    for (bool last = false; !last; group = group.parent_path()) {
      last = !group.has_relative_path();
      if (const auto most = number_in(root / group.relative_path() /
                                      (second ? "memory.max" : "memory.limit_in_bytes"))) {
        bytes = std::min(bytes, *most);
      }
    }
  }
  return bytes;
}

void check_memory(double bytes, const std::string& what) {
  const auto gib = [](double value) {
    std::array<char, 64> text{};
    std::snprintf(text.data(), text.size(), "%.2f GiB", value / (1 << 30));
    return std::string(text.data());
  };
  const auto available = static_cast<double>(free_memory());
  check(ErrorKind::kUsage, bytes <= available, what, " take ", gib(bytes),
        " of memory in this process, but only ", gib(available),
        " are free: take more or other machines and split the model over more tensor-parallel "
        "processes");
}

}  // namespace drrl
