#include "models/weights.h"

#include "core/error.h"
#include "models/tensor_parallel.h"

namespace drrl {
namespace {

// Builds the layouts of one rank: what is whole, and what is cut along which dimension.
class Layouts {
 public:
  Layouts(int64_t size, int64_t rank) : size_(size), rank_(rank) {}

  void whole(const std::string& name, std::vector<int64_t> shape) {
    const int64_t first = shape[0];
    layouts.push_back({name, shape, false, {{name, shape, 0, 0, first, 0}}});
  }

  // Several matrices (or biases) cut by rows in the units of `unit` rows and stacked; `inner` are the other dimensions.
  struct Rows {
    std::string name;
    int64_t units, unit;
  };
  void rows(const std::string& name, const std::vector<Rows>& stack, const std::vector<int64_t>& inner) {
    ParameterLayout layout{name, {0}, true, {}};
    layout.shape.insert(layout.shape.end(), inner.begin(), inner.end());
    for (const Rows& matrix : stack) {
      const Share share = partition(matrix.units, size_, rank_);
      std::vector<int64_t> shape = {matrix.units * matrix.unit};
      shape.insert(shape.end(), inner.begin(), inner.end());
      layout.parts.push_back({matrix.name, shape, 0, share.begin * matrix.unit, share.count * matrix.unit, layout.shape[0]});
      layout.shape[0] += share.count * matrix.unit;
    }
    layouts.push_back(std::move(layout));
  }

  void columns(const std::string& name, int64_t out, int64_t units, int64_t unit) {
    const Share share = partition(units, size_, rank_);
    layouts.push_back(
        {name, {out, share.count * unit}, true, {{name, {out, units * unit}, 1, share.begin * unit, share.count * unit, 0}}});
  }

  std::vector<ParameterLayout> layouts;

 private:
  int64_t size_, rank_;
};

}  // namespace

std::vector<ParameterLayout> parameter_layouts(const ModelConfig& config, int64_t tp_size, int64_t tp_rank) {
  check(ErrorKind::kUsage, tp_size <= config.num_key_value_heads, "tensor-parallel size ", tp_size,
        " is greater than the model's ", config.num_key_value_heads, " KV heads: a rank holds whole KV groups");
  check(ErrorKind::kUsage, tp_size <= config.intermediate_size && tp_size <= config.vocab_size, "tensor-parallel size ",
        tp_size, " is greater than intermediate_size ", config.intermediate_size, " or vocab_size ", config.vocab_size);
  const int64_t hidden = config.hidden_size;
  const int64_t groups = config.num_key_value_heads;
  const int64_t d = config.head_dim;
  const int64_t group_rows = config.heads_per_group() * d;  // query rows of a group
  const int64_t columns = config.intermediate_size;

  Layouts build(tp_size, tp_rank);
  build.rows("model.embed_tokens.weight", {{"model.embed_tokens.weight", config.vocab_size, 1}}, {hidden});
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    const std::string attention = layer + "self_attn.";
    const std::string mlp = layer + "mlp.";
    const auto qkv = [&](const char* what) -> std::vector<Layouts::Rows> {
      return {{attention + "q_proj." + what, groups, group_rows},
              {attention + "k_proj." + what, groups, d},
              {attention + "v_proj." + what, groups, d}};
    };
    const auto gate_up = [&](const char* what) -> std::vector<Layouts::Rows> {
      return {{mlp + "gate_proj." + what, columns, 1}, {mlp + "up_proj." + what, columns, 1}};
    };
    build.whole(layer + "input_layernorm.weight", {hidden});
    build.rows(attention + "qkv_proj.weight", qkv("weight"), {hidden});
    if (config.qkv_bias) {
      build.rows(attention + "qkv_proj.bias", qkv("bias"), {});
    }
    build.columns(attention + "o_proj.weight", hidden, groups, group_rows);
    if (config.attention_output_bias) {
      build.whole(attention + "o_proj.bias", {hidden});
    }
    build.whole(layer + "post_attention_layernorm.weight", {hidden});
    build.rows(mlp + "gate_up_proj.weight", gate_up("weight"), {hidden});
    if (config.mlp_bias) {
      build.rows(mlp + "gate_up_proj.bias", gate_up("bias"), {});
    }
    build.columns(mlp + "down_proj.weight", hidden, columns, 1);
    if (config.mlp_bias) {
      build.whole(mlp + "down_proj.bias", {hidden});
    }
  }
  build.whole("model.norm.weight", {hidden});
  if (!config.tie_word_embeddings) {
    build.rows("lm_head.weight", {{"lm_head.weight", config.vocab_size, 1}}, {hidden});
  }
  return std::move(build.layouts);
}

at::Tensor region(const at::Tensor& parameter, const WeightPart& part) {
  return part.dim == 0 ? parameter.narrow(0, part.row, part.length) : parameter;
}

}  // namespace drrl
