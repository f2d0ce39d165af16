#include "models/causal_lm/weights.h"

#include <utility>

#include "core/error.h"

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

  // Several matrices (or biases) of which a rank holds the rows of `share` in units of `unit` rows,
  // stacked; `inner` are the other dimensions. A matrix is `all` rows of a tensor in the file, or a
  // part of one, from row `first` on.
  struct Rows {
    std::string name;
    IndexRange share;
    int64_t unit, all;
    int64_t first = 0;
  };
  // Cut evenly.
  Rows even(const std::string& name, int64_t rows) const {
    return {name, partition(rows, size_, rank_), 1, rows};
  }
  void rows(const std::string& name, const std::vector<Rows>& stack,
            const std::vector<int64_t>& inner, bool transposed = false) {
    ParameterLayout layout{name, {0}, true, {}};
    layout.shape.insert(layout.shape.end(), inner.begin(), inner.end());
    const bool swap = transposed && !inner.empty();
    for (const Rows& matrix : stack) {
      std::vector<int64_t> shape = {matrix.all};
      shape.insert(swap ? shape.begin() : shape.end(), inner.begin(), inner.end());
      layout.parts.push_back({matrix.name, shape, swap ? 1 : 0,
                              matrix.first + matrix.share.begin * matrix.unit,
                              matrix.share.count * matrix.unit, layout.shape[0], swap});
      layout.shape[0] += matrix.share.count * matrix.unit;
    }
    layouts.push_back(std::move(layout));
  }

  void columns(const std::string& name, int64_t out, const IndexRange& share, int64_t unit,
               int64_t all, bool transposed) {
    std::vector<int64_t> shape = {out, all};
    if (transposed) {
      std::swap(shape[0], shape[1]);
    }
    layouts.push_back({name,
                       {out, share.count * unit},
                       true,
                       {{name, shape, transposed ? 0 : 1, share.begin * unit, share.count * unit, 0,
                         transposed}}});
  }

  std::vector<ParameterLayout> layouts;

 private:
  int64_t size_, rank_;
};

}  // namespace

const ParameterNames& parameter_names(const ModelConfig& config) {
  return config.is_gpt2() ? kGpt2Names : kLlamaNames;
}

HeadShare head_share(const ModelConfig& config, int64_t tp, int64_t rank) {
  check(ErrorKind::kUsage, tp <= config.num_attention_heads, "tensor-parallel size ", tp,
        " is greater than the model's ", config.num_attention_heads, " attention heads");
  const int64_t per_group = config.heads_per_group();
  HeadShare share{kv_heads_of(config.num_key_value_heads, tp, rank),
                  {},
                  kv_sharers_of(config.num_key_value_heads, tp, rank)};
  share.query_heads = {share.kv_heads.begin * per_group, share.kv_heads.count * per_group};
  if (share.sharers.count > 1) {
    const IndexRange own = partition(per_group, share.sharers.count, rank - share.sharers.begin);
    share.query_heads = {share.query_heads.begin + own.begin, own.count};
  }
  return share;
}

std::vector<ParameterLayout> parameter_layouts(const ModelConfig& config, int64_t tp_size,
                                               int64_t tp_rank) {
  check(ErrorKind::kUsage, tp_size <= config.intermediate_size && tp_size <= config.vocab_size,
        "tensor-parallel size ", tp_size, " is greater than intermediate_size ",
        config.intermediate_size, " or vocab_size ", config.vocab_size);
  const ParameterNames& names = parameter_names(config);
  const bool gpt2 = config.is_gpt2();
  const int64_t hidden = config.hidden_size;
  const HeadShare heads = head_share(config, tp_size, tp_rank);
  const int64_t d = config.head_dim;
  const int64_t query_rows = config.num_attention_heads * d,
                kv_rows = config.num_key_value_heads * d;
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
  build.rows(names.embedding + weight, {build.even(names.embedding + weight, config.vocab_size)},
             {hidden});
  if (gpt2) {
    build.whole(names.positions + weight, {config.max_position_embeddings, hidden});
  }
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const std::string layer = names.layers + std::to_string(i) + ".";
    const auto qkv = [&](const std::string& what) -> std::vector<Layouts::Rows> {
      if (gpt2) {
        const std::string name = layer + names.qkv + what;
        return {{name, heads.query_heads, d, 3 * hidden, 0},
                {name, heads.kv_heads, d, 3 * hidden, hidden},
                {name, heads.kv_heads, d, 3 * hidden, 2 * hidden}};
      }
      const std::string attention = layer + "self_attn.";
      return {{attention + "q_proj" + what, heads.query_heads, d, query_rows},
              {attention + "k_proj" + what, heads.kv_heads, d, kv_rows},
              {attention + "v_proj" + what, heads.kv_heads, d, kv_rows}};
    };
    const auto into_mlp = [&](const std::string& what) -> std::vector<Layouts::Rows> {
      if (gpt2) {
        return {build.even(layer + names.into_mlp + what, columns)};
      }
      return {build.even(layer + "mlp.gate_proj" + what, columns),
              build.even(layer + "mlp.up_proj" + what, columns)};
    };
    norm(layer + names.input_norm);
    const int64_t shared_rows = heads.sharers.count > 1 ? 2 * d : 0;
    build.rows(layer + names.qkv + weight, qkv(weight), {hidden}, gpt2);
    build.layouts.back().shared_rows = shared_rows;
    if (config.qkv_bias) {
      build.rows(layer + names.qkv + bias, qkv(bias), {});
      build.layouts.back().shared_rows = shared_rows;
    }
    build.columns(layer + names.o + weight, hidden, heads.query_heads, d, query_rows, gpt2);
    if (config.attention_output_bias) {
      build.whole(layer + names.o + bias, {hidden});
    }
    norm(layer + names.post_norm);
    build.rows(layer + names.into_mlp + weight, into_mlp(weight), {hidden}, gpt2);
    if (config.mlp_bias) {
      build.rows(layer + names.into_mlp + bias, into_mlp(bias), {});
    }
    build.columns(layer + names.down + weight, hidden, partition(columns, tp_size, tp_rank), 1,
                  columns, gpt2);
    if (config.mlp_bias) {
      build.whole(layer + names.down + bias, {hidden});
    }
  }
  norm(names.final_norm);
  if (!config.tie_word_embeddings) {
    build.rows("lm_head.weight", {build.even("lm_head.weight", config.vocab_size)}, {hidden});
  }
  return std::move(build.layouts);
}

at::Tensor region(const at::Tensor& parameter, const WeightPart& part) {
  const bool by_rows = part.transposed ? part.dim == 1 : part.dim == 0;
  const at::Tensor rows = by_rows ? parameter.narrow(0, part.row, part.length) : parameter;
  return part.transposed ? rows.t() : rows;
}

}  // namespace drrl
