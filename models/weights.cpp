#include "models/weights.h"

#include "core/error.h"
#include "models/tensor_parallel.h"

#include <utility>

namespace drrl {
namespace {

constexpr ParameterNames kLlamaNames = {.base = "model.",
                                        .embedding = "model.embed_tokens",
                                        .positions = nullptr,
                                        .layers = "model.layers.",
                                        .input_norm = "input_layernorm",
                                        .qkv = "self_attn.qkv_proj",
                                        .o = "self_attn.o_proj",
                                        .post_norm = "post_attention_layernorm",
                                        .into_mlp = "mlp.gate_up_proj",
                                        .down = "mlp.down_proj",
                                        .final_norm = "model.norm"};
constexpr ParameterNames kGpt2Names = {.base = "transformer.",
                                       .embedding = "transformer.wte",
                                       .positions = "transformer.wpe",
                                       .layers = "transformer.h.",
                                       .input_norm = "ln_1",
                                       .qkv = "attn.c_attn",
                                       .o = "attn.c_proj",
                                       .post_norm = "ln_2",
                                       .into_mlp = "mlp.c_fc",
                                       .down = "mlp.c_proj",
                                       .final_norm = "transformer.ln_f"};

// Builds the layouts of one rank: what is whole, and what is cut along which dimension.
class Layouts {
 public:
  Layouts(int64_t size, int64_t rank) : size_(size), rank_(rank) {}

  void whole(const std::string& name, std::vector<int64_t> shape) {
    const int64_t first = shape[0];
    layouts.push_back({name, shape, false, {{name, shape, 0, 0, first, 0}}});
  }

  // Several matrices (or biases) cut by rows in the units of `unit` rows and stacked; `inner` are the other dimensions. A matrix may be a
  // part of a tensor of `all` rows in the file, from row `first` on.
  struct Rows {
    std::string name;
    int64_t units, unit;
    int64_t first = 0, all = units * unit;
  };
  void rows(const std::string& name, const std::vector<Rows>& stack, const std::vector<int64_t>& inner, bool transposed = false) {
    ParameterLayout layout{name, {0}, true, {}};
    layout.shape.insert(layout.shape.end(), inner.begin(), inner.end());
    const bool swap = transposed && !inner.empty();
    for (const Rows& matrix : stack) {
      const Share share = partition(matrix.units, size_, rank_);
      std::vector<int64_t> shape = {matrix.all};
      shape.insert(swap ? shape.begin() : shape.end(), inner.begin(), inner.end());
      layout.parts.push_back({matrix.name, shape, swap ? 1 : 0, matrix.first + share.begin * matrix.unit, share.count * matrix.unit,
                              layout.shape[0], swap});
      layout.shape[0] += share.count * matrix.unit;
    }
    layouts.push_back(std::move(layout));
  }

  void columns(const std::string& name, int64_t out, int64_t units, int64_t unit, bool transposed) {
    const Share share = partition(units, size_, rank_);
    std::vector<int64_t> shape = {out, units * unit};
    if (transposed) {
      std::swap(shape[0], shape[1]);
    }
    layouts.push_back({name,
                       {out, share.count * unit},
                       true,
                       {{name, shape, transposed ? 0 : 1, share.begin * unit, share.count * unit, 0, transposed}}});
  }

  std::vector<ParameterLayout> layouts;

 private:
  int64_t size_, rank_;
};

}  // namespace

const ParameterNames& parameter_names(const ModelConfig& config) { return config.is_gpt2() ? kGpt2Names : kLlamaNames; }

std::vector<ParameterLayout> parameter_layouts(const ModelConfig& config, int64_t tp_size, int64_t tp_rank) {
  check(ErrorKind::kUsage, tp_size <= config.num_key_value_heads, "tensor-parallel size ", tp_size,
        " is greater than the model's ", config.num_key_value_heads, " KV heads: a rank holds whole KV groups");
  check(ErrorKind::kUsage, tp_size <= config.intermediate_size && tp_size <= config.vocab_size, "tensor-parallel size ",
        tp_size, " is greater than intermediate_size ", config.intermediate_size, " or vocab_size ", config.vocab_size);
  const ParameterNames& names = parameter_names(config);
  const bool gpt2 = config.is_gpt2();
  const int64_t hidden = config.hidden_size;
  const int64_t groups = config.num_key_value_heads;
  const int64_t d = config.head_dim;
  const int64_t group_rows = config.heads_per_group() * d;  // query rows of a group
  const int64_t columns = config.intermediate_size;
  const std::string weight = ".weight";
  const std::string bias = ".bias";

  Layouts build(tp_size, tp_rank);
  const auto norm = [&](const std::string& name) {
    build.whole(name + weight, {hidden});
    if (gpt2) {
      build.whole(name + bias, {hidden});
    }
  };
  build.rows(names.embedding + weight, {{names.embedding + weight, config.vocab_size, 1}}, {hidden});
  if (gpt2) {
    build.whole(names.positions + weight, {config.max_position_embeddings, hidden});
  }
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const std::string layer = names.layers + std::to_string(i) + ".";
    const auto qkv = [&](const std::string& what) -> std::vector<Layouts::Rows> {
      if (gpt2) {
        const std::string name = layer + names.qkv + what;
        return {{name, groups, d, 0, 3 * hidden}, {name, groups, d, hidden, 3 * hidden}, {name, groups, d, 2 * hidden, 3 * hidden}};
      }
      const std::string attention = layer + "self_attn.";
      return {{attention + "q_proj" + what, groups, group_rows},
              {attention + "k_proj" + what, groups, d},
              {attention + "v_proj" + what, groups, d}};
    };
    const auto into_mlp = [&](const std::string& what) -> std::vector<Layouts::Rows> {
      if (gpt2) {
        return {{layer + names.into_mlp + what, columns, 1}};
      }
      return {{layer + "mlp.gate_proj" + what, columns, 1}, {layer + "mlp.up_proj" + what, columns, 1}};
    };
    norm(layer + names.input_norm);
    build.rows(layer + names.qkv + weight, qkv(weight), {hidden}, gpt2);
    if (config.qkv_bias) {
      build.rows(layer + names.qkv + bias, qkv(bias), {});
    }
    build.columns(layer + names.o + weight, hidden, groups, group_rows, gpt2);
    if (config.attention_output_bias) {
      build.whole(layer + names.o + bias, {hidden});
    }
    norm(layer + names.post_norm);
    build.rows(layer + names.into_mlp + weight, into_mlp(weight), {hidden}, gpt2);
    if (config.mlp_bias) {
      build.rows(layer + names.into_mlp + bias, into_mlp(bias), {});
    }
    build.columns(layer + names.down + weight, hidden, columns, 1, gpt2);
    if (config.mlp_bias) {
      build.whole(layer + names.down + bias, {hidden});
    }
  }
  norm(names.final_norm);
  if (!config.tie_word_embeddings) {
    build.rows("lm_head.weight", {{"lm_head.weight", config.vocab_size, 1}}, {hidden});
  }
  return std::move(build.layouts);
}

at::Tensor region(const at::Tensor& parameter, const WeightPart& part) {
  const bool by_rows = part.transposed ? part.dim == 1 : part.dim == 0;
  const at::Tensor rows = by_rows ? parameter.narrow(0, part.row, part.length) : parameter;
  return part.transposed ? rows.t() : rows;
}

}  // namespace drrl
