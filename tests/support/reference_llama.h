#pragma once

// The Llama family and GPT-2 written down as their papers do, in double precision, head by head,
// with nothing fused, split or saved: the oracle of models/causal_lm/causal_lm.h on every layout.
// Gradients come from PyTorch's own autograd.

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/config.h"
#include "models/causal_lm/weights.h"

namespace drrl::test {

/// Whole tensors by their Hugging Face names, double, leaves that require grad.
using Weights = std::map<std::string, at::Tensor>;

/// Random weights of the size that makes every part of the model matter; norms and biases too.
inline Weights random_weights(const ModelConfig& config, uint64_t seed) {
  Weights weights;
  for (const ParameterLayout& layout : parameter_layouts(config, 1, 0)) {
    for (const WeightPart& part : layout.parts) {
      auto generator = at::make_generator<at::CPUGeneratorImpl>(++seed);
      const bool norm = part.shape.size() == 1 && part.name.ends_with(".weight");
      const double deviation = part.shape.size() > 1
                                   ? 0.8 / std::sqrt(static_cast<double>(config.hidden_size))
                                   : 0.2;
      at::Tensor value = at::empty(part.shape, at::kDouble)
                             .normal_(norm ? 1.0 : 0.0, deviation, generator);
      weights[part.name] = value.to(at::kFloat)
                               .to(at::kDouble)
                               .requires_grad_(true);  // representable in fp32
    }
  }
  return weights;
}

/// This rank's shards of `weights` into `model`.
inline void set_weights(CausalLM& model, const Weights& weights, const Group& tp) {
  at::NoGradGuard no_grad;
  const auto layouts = parameter_layouts(model.config(), tp.size(), tp.rank());
  for (size_t i = 0; i < layouts.size(); ++i) {
    for (const WeightPart& part : layouts[i].parts) {
      region(model.parameters()[i].value, part)
          .copy_(weights.at(part.name).narrow(part.dim, part.start, part.length));
    }
  }
}

inline at::Tensor reference_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return x / at::sqrt(x.pow(2).mean(-1, true) + eps) * weight;
}

inline at::Tensor reference_linear(const Weights& weights, const std::string& name,
                                   const at::Tensor& x, bool bias) {
  at::Tensor y = at::matmul(x, weights.at(name + ".weight").t());
  return bias ? y + weights.at(name + ".bias") : y;
}

/// x [L, d] rotated by its positions: pairs (i, i + d / 2) as complex numbers times e^(i position
/// frequency).
inline at::Tensor reference_rotate(const at::Tensor& x, const at::Tensor& frequencies) {
  const int64_t half = x.size(1) / 2;
  // The angle is rounded to fp32 as everywhere, see CausalLM::prepare_angles.
  const at::Tensor angle = at::outer(at::arange(x.size(0), at::kFloat), frequencies);
  const at::Tensor cos = angle.cos().to(at::kDouble);
  const at::Tensor sin = angle.sin().to(at::kDouble);
  const at::Tensor a = x.slice(1, 0, half);
  const at::Tensor b = x.slice(1, half);
  return at::cat({a * cos - b * sin, a * sin + b * cos}, 1);
}

/// GPT-2, x [L, features]: LayerNorm and Conv1D, whose weight is [in, out].
inline at::Tensor reference_gpt2_norm(const Weights& weights, const std::string& name,
                                      const at::Tensor& x, double eps) {
  const at::Tensor centred = x - x.mean(-1, true);
  return reference_norm(centred, weights.at(name + ".weight"), eps) + weights.at(name + ".bias");
}
inline at::Tensor reference_conv1d(const Weights& weights, const std::string& name,
                                   const at::Tensor& x) {
  return at::matmul(x, weights.at(name + ".weight")) + weights.at(name + ".bias");
}
inline at::Tensor reference_gelu(const at::Tensor& x, Activation activation) {
  return activation == Activation::kGelu
             ? 0.5 * x * (1.0 + at::erf(x / std::sqrt(2.0)))
             : 0.5 * x * (1.0 + at::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x.pow(3))));
}

inline at::Tensor reference_gpt2_logits(const ModelConfig& config, const Weights& weights,
                                        const at::Tensor& tokens) {
  const int64_t length = tokens.size(1);
  const int64_t d = config.head_dim;
  const at::Tensor future = at::ones({length, length}, at::kBool).triu(1);
  std::vector<at::Tensor> rows;
  for (int64_t b = 0; b < tokens.size(0); ++b) {
    at::Tensor h = weights.at("transformer.wte.weight").index_select(0, tokens[b]) +
                   weights.at("transformer.wpe.weight").slice(0, 0, length);
    for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
      const std::string layer = "transformer.h." + std::to_string(i) + ".";
      const at::Tensor qkv = reference_conv1d(
          weights, layer + "attn.c_attn",
          reference_gpt2_norm(weights, layer + "ln_1", h, config.norm_eps));
      std::vector<at::Tensor> heads;
      for (int64_t head = 0; head < config.num_attention_heads; ++head) {
        const auto part = [&](int64_t third) {
          return qkv.narrow(1, third * config.hidden_size + head * d, d);
        };
        at::Tensor scores = at::matmul(part(0), part(1).t());
        if (config.scale_attention) {
          scores = scores / std::sqrt(static_cast<double>(d));
        }
        if (config.scale_attention_by_layer) {
          scores = scores / static_cast<double>(i + 1);
        }
        heads.push_back(
            at::matmul(at::softmax(scores.masked_fill(future, -INFINITY), -1), part(2)));
      }
      h = h + reference_conv1d(weights, layer + "attn.c_proj", at::cat(heads, 1));
      const at::Tensor wide = reference_conv1d(
          weights, layer + "mlp.c_fc",
          reference_gpt2_norm(weights, layer + "ln_2", h, config.norm_eps));
      h = h +
          reference_conv1d(weights, layer + "mlp.c_proj", reference_gelu(wide, config.activation));
    }
    h = reference_gpt2_norm(weights, "transformer.ln_f", h, config.norm_eps);
    rows.push_back(at::matmul(
        h,
        weights.at(config.tie_word_embeddings ? "transformer.wte.weight" : "lm_head.weight").t()));
  }
  return at::stack(rows);
}

/// tokens [B, L] -> logits [B, L, vocabulary] in double.
inline at::Tensor reference_logits(const ModelConfig& config, const Weights& weights,
                                   const at::Tensor& tokens) {
  if (config.is_gpt2()) {
    return reference_gpt2_logits(config, weights, tokens);
  }
  const int64_t length = tokens.size(1);
  const int64_t d = config.head_dim;
  const at::Tensor frequencies = config.inverse_frequencies();
  const at::Tensor future = at::ones({length, length}, at::kBool).triu(1);
  std::vector<at::Tensor> rows;
  for (int64_t b = 0; b < tokens.size(0); ++b) {
    at::Tensor h = weights.at("model.embed_tokens.weight")
                       .index_select(0, tokens[b]);  // [L, hidden]
    for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
      const std::string layer = "model.layers." + std::to_string(i) + ".";
      at::Tensor x = reference_norm(h, weights.at(layer + "input_layernorm.weight"),
                                    config.norm_eps);
      const at::Tensor q = reference_linear(weights, layer + "self_attn.q_proj", x,
                                            config.qkv_bias);
      const at::Tensor k = reference_linear(weights, layer + "self_attn.k_proj", x,
                                            config.qkv_bias);
      const at::Tensor v = reference_linear(weights, layer + "self_attn.v_proj", x,
                                            config.qkv_bias);
      std::vector<at::Tensor> heads;
      for (int64_t head = 0; head < config.num_attention_heads; ++head) {
        const int64_t group = head / config.heads_per_group();
        const at::Tensor q_head = reference_rotate(q.slice(1, head * d, (head + 1) * d),
                                                   frequencies);
        const at::Tensor k_head = reference_rotate(k.slice(1, group * d, (group + 1) * d),
                                                   frequencies);
        const at::Tensor v_head = v.slice(1, group * d, (group + 1) * d);
        const at::Tensor scores = at::matmul(q_head, k_head.t()) /
                                  std::sqrt(static_cast<double>(d));
        heads.push_back(at::matmul(at::softmax(scores.masked_fill(future, -INFINITY), -1), v_head));
      }
      h = h + reference_linear(weights, layer + "self_attn.o_proj", at::cat(heads, 1),
                               config.attention_output_bias);
      x = reference_norm(h, weights.at(layer + "post_attention_layernorm.weight"), config.norm_eps);
      const at::Tensor gate = reference_linear(weights, layer + "mlp.gate_proj", x,
                                               config.mlp_bias);
      const at::Tensor up = reference_linear(weights, layer + "mlp.up_proj", x, config.mlp_bias);
      h = h + reference_linear(weights, layer + "mlp.down_proj", gate * at::sigmoid(gate) * up,
                               config.mlp_bias);
    }
    h = reference_norm(h, weights.at("model.norm.weight"), config.norm_eps);
    const std::string head = config.tie_word_embeddings ? "model.embed_tokens.weight"
                                                        : "lm_head.weight";
    rows.push_back(at::matmul(h, weights.at(head).t()));
  }
  return at::stack(rows);
}

/// logits [..., V], labels [...] -> -log p of every label, 0 where it does not count.
inline at::Tensor reference_nll(const at::Tensor& logits, const at::Tensor& labels) {
  const at::Tensor counted = labels.ne(kIgnoredLabel);
  const at::Tensor log_p = at::log_softmax(logits, -1)
                               .gather(
                                   -1,
                                   labels.masked_fill(labels.eq(kIgnoredLabel), 0).unsqueeze(-1));
  return -log_p.squeeze(-1) * counted;
}

/// ||a - b|| / ||b||; 0 for two zeros.
inline double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const double scale = b.detach().to(at::kDouble).norm().item<double>();
  const double
      error = (a.detach().to(at::kDouble) - b.detach().to(at::kDouble)).norm().item<double>();
  return error == 0.0 ? 0.0 : error / scale;
}

/// The gradient of every parameter of `model` must be this rank's part of the reference's, to
/// `tolerance` (relative, by norm).
inline void expect_gradients(const CausalLM& model, const Weights& weights, const Group& tp,
                             double scale, double tolerance) {
  const auto layouts = parameter_layouts(model.config(), tp.size(), tp.rank());
  ASSERT_EQ(layouts.size(), model.parameters().size());
  for (size_t i = 0; i < layouts.size(); ++i) {
    const Parameter& parameter = model.parameters()[i];
    ASSERT_TRUE(parameter.value.grad().defined()) << parameter.name;
    for (const WeightPart& part : layouts[i].parts) {
      const at::Tensor expected = weights.at(part.name).grad().narrow(part.dim, part.start,
                                                                      part.length) *
                                  scale;
      const double error = (region(parameter.value.grad(), part).to(at::kDouble) - expected)
                               .norm()
                               .item<double>();
      // Without rotation a bias of the keys moves all scores of a row alike: its gradient is zero
      // but for rounding.
      const double size = std::max(
          expected.norm().item<double>(),
          0.1 * parameter.value.grad().to(at::kDouble).norm().item<double>());
      EXPECT_LE(error, tolerance * size) << part.name << " on tp rank " << tp.rank();
    }
  }
}

/// A small model whose every dimension is a different, awkward number.
inline ModelConfig small_config(int64_t heads = 6, int64_t groups = 3) {
  ModelConfig config;
  config.vocab_size = 53;
  config.hidden_size = 40;
  config.intermediate_size = 37;
  config.num_hidden_layers = 2;
  config.num_attention_heads = heads;
  config.num_key_value_heads = groups;
  config.head_dim = 16;
  config.max_position_embeddings = 64;
  config.norm_eps = 1e-5;
  config.tie_word_embeddings = true;
  config.rope.theta = 1000.0;
  return config;
}

inline ModelConfig small_gpt2_config(int64_t heads = 3) {
  ModelConfig config = small_config(heads, heads);
  config.architecture = Architecture::kGpt2;
  config.hidden_size = 16 * heads;
  config.qkv_bias = config.attention_output_bias = config.mlp_bias = true;
  config.activation = Activation::kGeluTanh;
  config.rope.kind = RopeKind::kNone;
  return config;
}

/// Random tokens [batch, length] and their successors as labels, some of which do not count.
struct Text {
  at::Tensor tokens, labels;
};
inline Text random_text(const ModelConfig& config, int64_t batch, int64_t length,
                        uint64_t seed = 5) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const at::Tensor ids = at::randint(config.vocab_size, {batch, length + 1}, generator, at::kLong);
  at::Tensor labels = ids.slice(1, 1).clone();
  labels.select(1, length / 2).fill_(kIgnoredLabel);
  labels[0][0] = kIgnoredLabel;
  return {ids.slice(1, 0, length).contiguous(), labels};
}

}  // namespace drrl::test
