// CausalLM on one process against the plain reference: logits, loss, every gradient; checkpointing,
// precision, export, bad input.
#include "models/causal_lm/causal_lm.h"

#include <cmath>
#include <regex>

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/io/safetensors.h"
#include "models/causal_lm/model_folder.h"
#include "models/causal_lm/tensor_parallel.h"
#include "tests/support/io_support.h"
#include "tests/support/reference_llama.h"

namespace drrl::test {
namespace {

struct Variant {
  const char* name;
  std::function<void(ModelConfig&)> change;
};

const Variant kVariants[] = {
    {"tied", [](ModelConfig&) {}},
    {"untied", [](ModelConfig& c) { c.tie_word_embeddings = false; }},
    {"qwen2_bias", [](ModelConfig& c) { c.qkv_bias = true; }},
    {"all_biases",
     [](ModelConfig& c) { c.qkv_bias = c.attention_output_bias = c.mlp_bias = true; }},
    {"one_group", [](ModelConfig& c) { c.num_key_value_heads = 1; }},
    {"no_sharing", [](ModelConfig& c) { c.num_key_value_heads = c.num_attention_heads; }},
    {"wide_heads", [](ModelConfig& c) { c.head_dim = 32; }},
    {"llama3_rope",
     [](ModelConfig& c) {
       c.rope.kind = RopeKind::kLlama3;
       c.rope.factor = 4.0;
       c.rope.original_max_position_embeddings = 16;
     }},
    {"gpt2", [](ModelConfig& c) { c = small_gpt2_config(); }},
    {"gpt2_every_option",
     [](ModelConfig& c) {
       c = small_gpt2_config();
       c.tie_word_embeddings = c.scale_attention = false;
       c.scale_attention_by_layer = true;
       c.activation = Activation::kGelu;
     }},
};

class Llama : public testing::TestWithParam<Variant> {};

TEST_P(Llama, EqualsTheReferenceInDouble) {
  ModelConfig config = small_config();
  GetParam().change(config);
  const Weights weights = random_weights(config, 1);
  const Text text = random_text(config, 2, 19);
  const at::Tensor expected = reference_logits(config, weights, text.tokens);
  const at::Tensor expected_nll = reference_nll(expected, text.labels);
  expected_nll.sum().backward();

  CausalLM model(config, Group(), make_exact_attention(),
                 {.dtype = at::kDouble, .loss_chunk_rows = 7});
  set_weights(model, weights, Group());
  EXPECT_LE(relative_error(model.logits(text.tokens), expected), 1e-10);
  EXPECT_LE(relative_error(model.token_nll(text.tokens, text.labels), expected_nll),
            1e-6);  // handed out in fp32
  const LossResult result = model.loss(text.tokens, text.labels, 0.25);
  EXPECT_EQ(result.tokens, text.labels.ne(kIgnoredLabel).sum().item<int64_t>());
  EXPECT_LE(relative_error(result.loss_sum, expected_nll.sum()), 1e-12);
  result.loss_sum.backward();
  expect_gradients(model, weights, Group(), 0.25, 1e-9);
}

TEST_P(Llama, EqualsTheReferenceInSinglePrecision) {
  ModelConfig config = small_config();
  GetParam().change(config);
  const Weights weights = random_weights(config, 1);
  const Text text = random_text(config, 2, 19);
  const at::Tensor expected = reference_logits(config, weights, text.tokens);
  reference_nll(expected, text.labels).sum().backward();

  CausalLM model(config, Group(), make_exact_attention(), {.loss_chunk_rows = 16});
  set_weights(model, weights, Group());
  EXPECT_LE((model.logits(text.tokens) - expected.detach()).abs().max().item<double>(), 2e-5);
  model.loss(text.tokens, text.labels).loss_sum.backward();
  expect_gradients(model, weights, Group(), 1.0, 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Variants, Llama, testing::ValuesIn(kVariants),
                         [](const auto& test) { return test.param.name; });

std::vector<at::Tensor> gradients_of(const ModelConfig& config, const Weights& weights,
                                     const Text& text, const ModelOptions& options) {
  CausalLM model(config, Group(), make_exact_attention(), options);
  set_weights(model, weights, Group());
  for (int micro_batch = 0; micro_batch < 2; ++micro_batch) {
    model.loss(text.tokens, text.labels).loss_sum.backward();
  }
  std::vector<at::Tensor> gradients;
  for (const Parameter& parameter : model.parameters()) {
    gradients.push_back(parameter.value.grad());
  }
  return gradients;
}

class Families : public testing::TestWithParam<bool> {
 protected:
  ModelConfig config_ = GetParam() ? small_gpt2_config() : small_config();
};
INSTANTIATE_TEST_SUITE_P(Both, Families, testing::Bool(),
                         [](const auto& test) { return test.param ? "gpt2" : "llama"; });

TEST_P(Families, CheckpointingChangesNoBit) {
  ModelConfig config = config_;
  config.qkv_bias = config.mlp_bias = true;
  const Weights weights = random_weights(config, 1);
  const Text text = random_text(config, 2, 33);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const auto kept = gradients_of(config, weights, text, {.dtype = dtype});
    const auto recomputed = gradients_of(config, weights, text,
                                         {.dtype = dtype, .activation_checkpoint = true});
    for (size_t i = 0; i < kept.size(); ++i) {
      EXPECT_TRUE(kept[i].equal(recomputed[i])) << i << " in " << dtype;
    }
  }
}

// A controller that makes a plan on the first call of a layer and must be given it back on the
// recomputation.
struct PlanCounter : AttentionController {
  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) override {
    EXPECT_EQ(w_o.sizes(), (std::vector<int64_t>{40, q.size(1) * q.size(3)}));
    EXPECT_TRUE(q.is_contiguous() && k.is_contiguous() && v.is_contiguous());
    if (plan) {
      EXPECT_EQ(plan.get(), plans.at(layer).get());
      ++replayed;
    } else {
      plan = plans[layer] = std::shared_ptr<LayerPlan>(
          reinterpret_cast<LayerPlan*>(&storage[layer]), [](LayerPlan*) {});
      ++decided;
    }
    return full->attend(layer, q, k, v, w_o, plan);
  }
  std::shared_ptr<AttentionController> full = make_exact_attention();
  std::map<int64_t, std::shared_ptr<LayerPlan>> plans;
  std::map<int64_t, char> storage;
  int decided = 0, replayed = 0;
};

TEST(LlamaTest, RecomputationReplaysThePlanOfEachLayer) {
  const ModelConfig config = small_config();
  auto controller = std::make_shared<PlanCounter>();
  CausalLM model(config, Group(), controller, {.activation_checkpoint = true});
  model.initialize(3);
  const Text text = random_text(config, 1, 12);
  model.loss(text.tokens, text.labels).loss_sum.backward();
  EXPECT_EQ(controller->decided, 2);
  EXPECT_EQ(controller->replayed, 2);
}

TEST_P(Families, Bfloat16IsCloseAndKeepsFp32Masters) {
  const ModelConfig& config = config_;
  const Weights weights = random_weights(config, 1);
  const Text text = random_text(config, 2, 40);
  CausalLM exact(config, Group(), make_exact_attention());
  CausalLM rounded(config, Group(), make_exact_attention(), {.dtype = at::kBFloat16});
  set_weights(exact, weights, Group());
  set_weights(rounded, weights, Group());
  const LossResult a = exact.loss(text.tokens, text.labels);
  const LossResult b = rounded.loss(text.tokens, text.labels);
  EXPECT_EQ(b.loss_sum.scalar_type(), at::kFloat);
  EXPECT_LE(relative_error(b.loss_sum, a.loss_sum), 5e-3);
  EXPECT_NE(a.loss_sum.item<float>(),
            b.loss_sum.item<float>());  // it did compute in lower precision
  EXPECT_EQ(rounded.hidden(text.tokens).scalar_type(), at::kBFloat16);
  a.loss_sum.backward();
  b.loss_sum.backward();
  for (size_t i = 0; i < exact.parameters().size(); ++i) {
    const at::Tensor& value = rounded.parameters()[i].value;
    EXPECT_EQ(value.scalar_type(), at::kFloat);
    EXPECT_EQ(value.grad().scalar_type(), at::kFloat);
    EXPECT_LE(relative_error(value.grad(), exact.parameters()[i].value.grad()), 4e-2)
        << exact.parameters()[i].name;
  }
}

TEST(LlamaTest, GradientsAccumulateInPlace) {
  ModelConfig config = small_config();
  config.qkv_bias = true;
  const Weights weights = random_weights(config, 1);
  const Text text = random_text(config, 1, 17);
  CausalLM model(config, Group(), make_exact_attention());
  set_weights(model, weights, Group());
  model.loss(text.tokens, text.labels).loss_sum.backward();
  std::vector<at::Tensor> once, storage;
  for (const Parameter& parameter : model.parameters()) {
    once.push_back(parameter.value.grad().clone());
    storage.push_back(parameter.value.grad());
  }
  model.loss(text.tokens, text.labels).loss_sum.backward();
  for (size_t i = 0; i < once.size(); ++i) {
    EXPECT_TRUE(model.parameters()[i].value.grad().is_same(storage[i]))
        << model.parameters()[i].name;
    EXPECT_LE(relative_error(storage[i], 2.0 * once[i]), 1e-6) << model.parameters()[i].name;
  }
}

TEST_P(Families, TellsWhichGradientsAreComplete) {
  const ModelConfig& config = config_;
  for (const bool checkpoint : {false, true}) {
    CausalLM model(config, Group(), make_exact_attention(), {.activation_checkpoint = checkpoint});
    model.initialize(3);
    const Text text = random_text(config, 1, 12);
    model.loss(text.tokens, text.labels).loss_sum.backward();
    std::vector<at::Tensor> expected;
    for (const Parameter& parameter : model.parameters()) {
      expected.push_back(parameter.value.grad().clone());
      parameter.value.mutable_grad().reset();
    }
    std::vector<int64_t> calls;
    model.on_gradients_complete([&](int64_t first) {
      calls.push_back(first);
      for (size_t i = static_cast<size_t>(first); i < expected.size(); ++i) {
        const at::Tensor& grad = model.parameters()[i].value.grad();
        EXPECT_TRUE(grad.defined() && grad.equal(expected[i]))
            << model.parameters()[i].name << " at " << first;
      }
    });
    model.loss(text.tokens, text.labels).loss_sum.backward();
    ASSERT_EQ(calls.size(), 2u);
    for (const size_t i : {0, 1}) {
      const std::string layer = std::to_string(1 - i);
      EXPECT_EQ(model.parameters()[static_cast<size_t>(calls[i])].name,
                GetParam() ? "transformer.h." + layer + ".ln_1.weight"
                           : "model.layers." + layer + ".input_layernorm.weight");
    }
  }
}

TEST(LlamaTest, TheFutureChangesNothingBeforeIt) {
  const ModelConfig config = small_config();
  CausalLM model(config, Group(), make_exact_attention());
  set_weights(model, random_weights(config, 1), Group());
  const Text text = random_text(config, 1, 40);
  at::Tensor changed = text.tokens.clone();
  changed.slice(1, 23) = (changed.slice(1, 23) + 7).remainder(config.vocab_size);
  const at::Tensor before = model.logits(text.tokens);
  const at::Tensor after = model.logits(changed);
  EXPECT_TRUE(before.slice(1, 0, 23).equal(after.slice(1, 0, 23)));
  EXPECT_FALSE(before.slice(1, 23).equal(after.slice(1, 23)));
}

TEST(LlamaTest, EvaluationBuildsNoGraph) {
  const ModelConfig config = small_config();
  CausalLM model(config, Group(), make_exact_attention(), {.activation_checkpoint = true});
  model.initialize(3);
  const Text text = random_text(config, 1, 12);
  EXPECT_FALSE(model.token_nll(text.tokens, text.labels).requires_grad());
  EXPECT_FALSE(model.logits(text.tokens).requires_grad());
  at::NoGradGuard no_grad;
  EXPECT_FALSE(model.loss(text.tokens, text.labels).loss_sum.requires_grad());
  for (const Parameter& parameter : model.parameters()) {
    EXPECT_FALSE(parameter.value.grad().defined()) << parameter.name;
  }
}

TEST(LlamaTest, ParametersSayWhatTheyAre) {
  ModelConfig config = small_config();
  config.qkv_bias = true;
  const CausalLM model(config, Group(), make_exact_attention());
  int64_t total = 0;
  for (const Parameter& parameter : model.parameters()) {
    total += parameter.value.numel();
    EXPECT_EQ(parameter.decay,
              parameter.name.ends_with("_proj.weight") || parameter.name.ends_with("tokens.weight"))
        << parameter.name;
    EXPECT_EQ(parameter.sharded, !parameter.name.ends_with("norm.weight")) << parameter.name;
    EXPECT_TRUE(parameter.value.is_leaf() && parameter.value.requires_grad()) << parameter.name;
  }
  EXPECT_EQ(total, config.parameter_count());
  EXPECT_EQ(total, model.parameter_count());
}

TEST(Gpt2Test, ParametersSayWhatTheyAre) {
  for (const bool tied : {true, false}) {
    ModelConfig config = small_gpt2_config();
    config.tie_word_embeddings = tied;
    const CausalLM model(config, Group(), make_exact_attention());
    int64_t total = 0;
    for (const Parameter& parameter : model.parameters()) {
      const std::string& name = parameter.name;
      total += parameter.value.numel();
      EXPECT_EQ(parameter.decay,
                name.ends_with(".weight") && name.find(".ln_") == std::string::npos)
          << name;
      EXPECT_EQ(parameter.sharded, name.find("ln_") == std::string::npos &&
                                       !name.ends_with("c_proj.bias") &&
                                       !name.ends_with("wpe.weight"))
          << name;
    }
    EXPECT_EQ(total, config.parameter_count());
  }
}

ModelConfig written_gpt2_config() {
  return ModelConfig::parse(R"({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], )"
                            R"("vocab_size": 53, "n_embd": 48, "n_layer": 2,
                                "n_head": 3, "n_inner": 37, "n_positions": 64, )"
                            R"("torch_dtype": "float32"})",
                            "test");
}

TEST(Gpt2Test, ExportsAndReloadsWithAndWithoutThePrefix) {
  const ModelConfig config = written_gpt2_config();
  const Text text = random_text(config, 1, 20);
  CausalLM model(config, Group(), make_exact_attention());
  set_weights(model, random_weights(config, 1), Group());
  const at::Tensor logits = model.logits(text.tokens);
  const TemporaryDirectory folder;
  model.save(folder / "model");
  const SafetensorsFile file(folder / "model/model.safetensors");
  EXPECT_EQ(file.entry("transformer.h.1.attn.c_attn.weight").shape,
            (std::vector<int64_t>{48, 144}));
  EXPECT_EQ(file.entry("transformer.h.0.mlp.c_proj.weight").shape, (std::vector<int64_t>{37, 48}));
  EXPECT_FALSE(file.contains("lm_head.weight"));
  const ModelConfig reread = ModelConfig::load(folder / "model");
  CausalLM again(reread, Group(), make_exact_attention());
  again.load(folder / "model");
  EXPECT_TRUE(again.logits(text.tokens).equal(logits));

  // The original release: no prefix, and the causal masks as tensors.
  std::vector<NamedTensor> bare;
  for (const auto& [name, entry] : file.entries()) {
    bare.push_back({name.substr(std::string("transformer.").size()), file.tensor(name)});
  }
  bare.push_back({"h.0.attn.bias", at::ones({1, 1, 64, 64}).tril()});
  bare.push_back({"h.0.attn.masked_bias", at::full({}, -1e4)});
  write_safetensors(folder / "model/model.safetensors", bare);
  CausalLM original(reread, Group(), make_exact_attention());
  original.load(folder / "model");
  EXPECT_TRUE(original.logits(text.tokens).equal(logits));
}

TEST(Gpt2Test, DrawsResidualWeightsSmaller) {
  const ModelConfig config = written_gpt2_config();
  CausalLM model(config, Group(), make_exact_attention());
  model.initialize(3);
  for (const Parameter& parameter : model.parameters()) {
    if (parameter.decay) {
      const double expected = config.initializer_range / (parameter.name.ends_with("c_proj.weight")
                                                              ? 2.0
                                                              : 1.0);  // sqrt(2 * 2 layers)
      EXPECT_NEAR(parameter.value.std().item<double>(), expected, 0.1 * expected) << parameter.name;
    }
  }
}

TEST(LlamaTest, InitializationDependsOnTheSeedAlone) {
  const ModelConfig config = small_config();
  CausalLM a(config, Group(), make_exact_attention());
  CausalLM b(config, Group(), make_exact_attention());
  a.initialize(7);
  b.initialize(7);
  EXPECT_TRUE(a.parameters()[0].value.equal(b.parameters()[0].value));
  EXPECT_NEAR(a.parameters()[0].value.std().item<double>(), config.initializer_range,
              0.1 * config.initializer_range);
  b.initialize(8);
  EXPECT_FALSE(a.parameters()[0].value.equal(b.parameters()[0].value));
  EXPECT_FALSE(
      a.parameters()[2].value.slice(0, 0, 37).equal(a.parameters()[2].value.slice(0, 37, 74)));
}

ModelConfig written_config(const ModelConfig& config) {
  return ModelConfig::parse(
      c10::str(R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"], )"
               R"("hidden_act": "silu", "torch_dtype": "float32")",
               R"(, "vocab_size": )", config.vocab_size, R"(, "hidden_size": )", config.hidden_size,
               R"(, "intermediate_size": )", config.intermediate_size, R"(, "num_hidden_layers": )",
               config.num_hidden_layers, R"(, "num_attention_heads": )", config.num_attention_heads,
               R"(, "num_key_value_heads": )", config.num_key_value_heads, R"(, "head_dim": )",
               config.head_dim, R"(, "max_position_embeddings": )", config.max_position_embeddings,
               R"(, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "tie_word_embeddings": )",
               config.tie_word_embeddings ? "true" : "false",
               R"(, "attention_bias": true, "mlp_bias": true})"),
      "test");
}

TEST(LlamaTest, ExportsAndReloads) {
  for (const bool tied : {true, false}) {
    ModelConfig config = small_config();
    config.tie_word_embeddings = tied;
    config = written_config(config);
    ASSERT_TRUE(config.qkv_bias && config.attention_output_bias && config.mlp_bias);
    const Text text = random_text(config, 1, 20);
    CausalLM model(config, Group(), make_exact_attention());
    set_weights(model, random_weights(config, 1), Group());
    const at::Tensor logits = model.logits(text.tokens);

    const TemporaryDirectory folder;
    model.save(folder / "fp32");
    CausalLM again(ModelConfig::load(folder / "fp32"), Group(), make_exact_attention());
    again.load(folder / "fp32");
    EXPECT_TRUE(again.logits(text.tokens).equal(logits));
    EXPECT_EQ(SafetensorsFile(folder / "fp32/model.safetensors").contains("lm_head.weight"), !tied);
    EXPECT_TRUE(SafetensorsFile(folder / "fp32/model.safetensors")
                    .contains("model.layers.1.self_attn.k_proj.bias"));

    write_bytes(folder / "fp32/tokenizer.json", "{}");
    write_bytes(folder / "fp32/generation_config.json", "{\"eos_token_id\": 2}");
    again.load(folder / "fp32");
    again.save(folder / "bf16", at::kBFloat16);
    EXPECT_EQ(read_bytes(folder / "bf16/generation_config.json"), "{\"eos_token_id\": 2}");
    EXPECT_EQ(listing(folder / "bf16"),
              (std::vector<std::string>{"config.json", "generation_config.json",
                                        "model.safetensors", "tokenizer.json"}));
    const SafetensorsFile file(folder / "bf16/model.safetensors");
    for (const auto& [name, entry] : file.entries()) {
      EXPECT_EQ(entry.dtype, at::kBFloat16) << name;
    }
    CausalLM rounded(ModelConfig::load(folder / "bf16"), Group(), make_exact_attention());
    rounded.load(folder / "bf16");
    EXPECT_LE(relative_error(rounded.logits(text.tokens), logits), 3e-2);
    EXPECT_TRUE(rounded.parameters()[2].value.equal(
        model.parameters()[2].value.to(at::kBFloat16).to(at::kFloat)));
  }
}

TEST(LlamaTest, DoesNotExportWhatItWouldRefuse) {
  ModelConfig config = written_config(small_config());
  const TemporaryDirectory folder;
  CausalLM(config, Group(), make_exact_attention()).save(folder / "model");
  const std::string weights = read_bytes(folder / "model/model.safetensors"),
                    text = read_bytes(folder / "model/config.json");
  CausalLM large(config, Group(), make_exact_attention());
  {
    const at::NoGradGuard no_grad;
    large.parameters()[1].value.fill_(3.4e38);  // finite in fp32
  }
  expect_error(ErrorKind::kNumerics, {"model", "is not finite in BFloat16"},
               [&] { large.save(folder / "model", at::kBFloat16); });
  config.original_json = "{}";
  expect_error(ErrorKind::kModel, {"config.json\" was not written", "model_type"},
               [&] { CausalLM(config, Group(), make_exact_attention()).save(folder / "model"); });
  EXPECT_EQ(read_bytes(folder / "model/model.safetensors"), weights);
  EXPECT_EQ(read_bytes(folder / "model/config.json"), text);
}

TEST(LlamaTest, RefusesWeightsThatAreNotTheModels) {
  const ModelConfig config = written_config(small_config());
  CausalLM model(config, Group(), make_exact_attention());
  model.initialize(1);
  const TemporaryDirectory folder;
  model.save(folder / "model");
  const auto whole = folder / "whole";
  model.save(whole);
  const SafetensorsFile file(folder / "model/model.safetensors");
  const auto rewrite = [&](const std::function<void(std::map<std::string, at::Tensor>&)>& change) {
    std::map<std::string, at::Tensor> tensors;
    for (const auto& [name, entry] : file.entries()) {
      tensors[name] = file.tensor(name);
    }
    change(tensors);
    std::vector<NamedTensor> list;
    for (const auto& [name, tensor] : tensors) {
      list.push_back({name, tensor});
    }
    write_safetensors(folder / "model/model.safetensors", list);
  };
  rewrite([](auto& tensors) { tensors.erase("model.layers.1.mlp.up_proj.weight"); });
  expect_error(ErrorKind::kModel, {"model.layers.1.mlp.up_proj.weight"},
               [&] { model.load(folder / "model"); });
  rewrite(
      [](auto& tensors) { tensors["model.layers.0.self_attn.q_norm.weight"] = at::ones({16}); });
  expect_error(ErrorKind::kModel, {"model.layers.0.self_attn.q_norm.weight"},
               [&] { model.load(folder / "model"); });
  rewrite([](auto& tensors) { tensors["model.norm.weight"] = at::ones({41}); });
  expect_error(ErrorKind::kModel, {"model.norm.weight", "[41]", "[40]"},
               [&] { model.load(folder / "model"); });
  EXPECT_NO_THROW(model.load(whole));
  rewrite([](auto& tensors) { tensors["model.norm.weight"] = at::ones({40}, at::kInt); });
  expect_error(ErrorKind::kModel, {"model.norm.weight", "Int", "quantized"},
               [&] { model.load(folder / "model"); });
  rewrite([](auto& tensors) { tensors["lm_head.weight"] = at::ones({53, 40}); });
  expect_error(ErrorKind::kModel, {"lm_head.weight", "tie_word_embeddings"},
               [&] { model.load(folder / "model"); });
  rewrite([](auto& tensors) { tensors["lm_head.weight"] = at::ones({53, 41}); });
  expect_error(ErrorKind::kModel, {"lm_head.weight", "[53, 41]", "vocab_size = 53"},
               [&] { model.load(folder / "model"); });
}

// Sizes that only the weights can contradict are refused before anything of such a size is
// allocated.
TEST(LlamaTest, HoldsAConfigAgainstItsWeightsFirst) {
  const ModelConfig config = written_config(small_config());
  CausalLM model(config, Group(), make_exact_attention());
  model.initialize(1);
  const TemporaryDirectory folder;
  model.save(folder / "model");
  const std::string original = read_bytes(folder / "model/config.json");
  const auto refused = [&](const std::string& field, const std::string& value,
                           const std::vector<std::string>& fragments) {
    SCOPED_TRACE(field);
    write_bytes(folder / "model/config.json",
                std::regex_replace(original, std::regex("\"" + field + "\": \\w+"),
                                   "\"" + field + "\": " + value));
    expect_error(ErrorKind::kModel, fragments, [&] { load_model_config(folder / "model"); });
  };
  refused("num_hidden_layers", "16000", {"model.safetensors", "num_hidden_layers = 16000"});
  refused("num_hidden_layers", "3",
          {"model.safetensors", "model.layers.2.input_layernorm.weight", "num_hidden_layers = 3"});
  refused("num_hidden_layers", "1", {"model.layers.1.", "has no place"});
  refused("vocab_size", "200000000",
          {"model.embed_tokens.weight", "[53, 40]", "vocab_size = 200000000, hidden_size = 40"});
  refused("hidden_size", "1000000", {"hidden_size = 1000000"});
  refused("intermediate_size", "4000000", {"mlp.gate_proj.weight", "intermediate_size = 4000000"});
  refused("head_dim", "600000", {"self_attn.q_proj.weight", "head_dim = 600000"});
  write_bytes(folder / "model/config.json", original);
  EXPECT_TRUE(load_model_config(folder / "model").warnings.empty());
  std::filesystem::remove(folder / "model/model.safetensors");
  expect_error(ErrorKind::kModel, {"neither model.safetensors"},
               [&] { load_model_config(folder / "model"); });
}

TEST(LlamaTest, NamesWhatItDoesNotRead) {
  const ModelConfig config = written_config(small_config());
  CausalLM model(config, Group(), make_exact_attention());
  model.initialize(1);
  const TemporaryDirectory folder;
  model.save(folder.path());
  std::vector<NamedTensor> tensors;
  {
    const SafetensorsFile file(folder / "model.safetensors");
    for (const auto& [name, entry] : file.entries()) {
      tensors.push_back({name, file.tensor(name)});
    }
  }
  const auto warning = [&](const at::Tensor& table) {
    auto all = tensors;
    all.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", table});
    all.push_back({"model.layers.1.self_attn.rotary_emb.inv_freq", table});
    write_safetensors(folder / "model.safetensors", all);
    const auto warnings = load_model_config(folder.path()).warnings;
    EXPECT_EQ(warnings.size(), 1U);
    return warnings.empty() ? "" : warnings.front();
  };
  EXPECT_NE(warning(config.inverse_frequencies().to(at::kBFloat16))
                .find("layers.0.self_attn.rotary_emb.inv_freq and 1 more"),
            std::string::npos);
  EXPECT_NE(warning(config.inverse_frequencies() * 0.5).find("contradicts the rope fields"),
            std::string::npos);
  write_safetensors(folder / "model.safetensors", tensors);
  write_bytes(folder / "model.safetensors.index.json", "{}");
  EXPECT_NE(load_model_config(folder.path()).warnings.at(0).find("index.json beside it"),
            std::string::npos);
  write_bytes(folder / "adapter_config.json", "{}");
  expect_error(ErrorKind::kModel, {"adapter_config.json", "merge"},
               [&] { load_model_config(folder.path()); });
}

TEST_P(Families, AHeadThatDiffersFromATiedEmbeddingIsKept) {
  const ModelConfig tied = GetParam() ? written_gpt2_config() : written_config(small_config());
  const std::string embedding = std::string(parameter_names(tied).embedding) + ".weight";
  ModelConfig untied = tied;
  untied.tie_word_embeddings = false;
  const Text text = random_text(tied, 1, 20);
  CausalLM model(untied, Group(), make_exact_attention());
  set_weights(model, random_weights(untied, 1), Group());
  const TemporaryDirectory folder;
  model.save(folder / "model");
  write_bytes(folder / "model/config.json", tied.export_json(at::kFloat));

  const ModelConfig read = load_model_config(folder / "model");
  EXPECT_FALSE(read.tie_word_embeddings);
  ASSERT_FALSE(read.warnings.empty());
  EXPECT_NE(read.warnings.back().find("lm_head.weight"), std::string::npos) << read.warnings.back();
  CausalLM again(read, Group(), make_exact_attention());
  again.load(folder / "model");
  EXPECT_TRUE(again.logits(text.tokens).equal(model.logits(text.tokens)));
  again.save(folder / "export");
  EXPECT_FALSE(ModelConfig::load(folder / "export").tie_word_embeddings);
  EXPECT_TRUE(SafetensorsFile(folder / "export/model.safetensors").contains("lm_head.weight"));
  CausalLM unaware(ModelConfig::load(folder / "model"), Group(), make_exact_attention());
  expect_error(ErrorKind::kModel, {"model.safetensors", "lm_head.weight"},
               [&] { unaware.load(folder / "model"); });

  // Equal to the embedding, or in its place: tied.
  std::map<std::string, at::Tensor> tensors;
  {
    const SafetensorsFile file(folder / "model/model.safetensors");
    for (const auto& [name, entry] : file.entries()) {
      tensors[name] = file.tensor(name);
    }
  }
  tensors["lm_head.weight"] = tensors.at(embedding);
  at::Tensor equal;
  for (const bool both : {true, false}) {
    std::vector<NamedTensor> list;
    for (const auto& [name, tensor] : tensors) {
      if (both || name != embedding) {
        list.push_back({name, tensor});
      }
    }
    write_safetensors(folder / "model/model.safetensors", list);
    const ModelConfig config = load_model_config(folder / "model");
    EXPECT_TRUE(config.tie_word_embeddings);
    EXPECT_EQ(config.warnings, tied.warnings);
    CausalLM one(config, Group(), make_exact_attention());
    one.load(folder / "model");
    const at::Tensor logits = one.logits(text.tokens);
    EXPECT_TRUE(both || logits.equal(equal));
    equal = logits;
  }
}

// A small model of random weights, and the same in `folder`.
CausalLM saved_model(const std::filesystem::path& folder) {
  CausalLM model(written_config(small_config()), Group(), make_exact_attention());
  model.initialize(1);
  model.save(folder);
  return model;
}

TEST(LlamaTest, AnExportHoldsNothingOfAnotherModel) {
  const TemporaryDirectory folder;
  CausalLM model = saved_model(folder / "model");
  write_bytes(folder / "model/tokenizer.json", "B");
  write_bytes(folder / "model/merges.txt", "");
  model.load(folder / "model");
  std::filesystem::create_directory(folder / "hf");
  for (const char* name :
       {"tokenizer.json", "tokenizer.model", "special_tokens_map.json", "generation_config.json",
        "chat_template.jinja", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "pytorch_model.bin", "README.md",
        "model-card.safetensors"}) {
    write_bytes(folder / "hf" / name, "A");
  }
  model.save(folder / "hf");
  EXPECT_EQ(read_bytes(folder / "hf/tokenizer.json"), "B");
  EXPECT_EQ(
      listing(folder / "hf"),
      (std::vector<std::string>{"README.md", "config.json", "merges.txt", "model-card.safetensors",
                                "model.safetensors", "tokenizer.json"}));
  model.save(folder / "model");  // onto itself
  EXPECT_EQ(read_bytes(folder / "model/tokenizer.json"), "B");
}

TEST(LlamaTest, WhatAnExportCopiesIsOpenedBefore) {
  const TemporaryDirectory folder;
  CausalLM model = saved_model(folder / "model");
  write_bytes(folder / "model/tokenizer.json", "{}");
  std::filesystem::resize_file(folder / "model/tokenizer.json", 70 << 20);
  model.load(folder / "model");
  model.open_companions();
  std::filesystem::remove(folder / "model/tokenizer.json");  // no matter
  model.save(folder / "hf");
  EXPECT_EQ(std::filesystem::file_size(folder / "hf/tokenizer.json"), 70U << 20);

  std::filesystem::create_directory(folder / "model/vocab.json");
  model.load(folder / "model");
  expect_error(ErrorKind::kModel, {"vocab.json"}, [&] { model.open_companions(); });
}

TEST(LlamaTest, RefusesWhatCannotFitIntoMemory) {
  EXPECT_GT(free_memory(), int64_t{1} << 20);
  EXPECT_NO_THROW(check_memory(1 << 20, "1000 weights"));
  expect_error(ErrorKind::kUsage, {"1000 weights take 1048576.00 GiB", "GiB are free"},
               [] { check_memory(std::ldexp(1.0, 50), "1000 weights"); });
  ModelConfig large = small_config();
  large.vocab_size = int64_t{1} << 28;
  large.hidden_size = int64_t{1} << 20;
  expect_error(ErrorKind::kUsage, {"weights take", "tensor-parallel"},
               [&] { CausalLM(large, Group(), make_exact_attention()); });
}

TEST(LlamaTest, RefusesBadInputWithTheValues) {
  const ModelConfig config = small_config();
  CausalLM model(config, Group(), make_exact_attention());
  model.initialize(1);
  const at::Tensor tokens = at::zeros({1, 65}, at::kLong);
  expect_error(ErrorKind::kUsage, {"65", "64"}, [&] { model.hidden(tokens); });
  const at::Tensor good = tokens.slice(1, 0, 8).contiguous();
  expect_error(ErrorKind::kUsage, {"[8]"}, [&] { model.hidden(good[0]); });
  expect_error(ErrorKind::kUsage, {"Int"}, [&] { model.hidden(good.to(at::kInt)); });
  expect_error(ErrorKind::kUsage, {"[0, 8]"}, [&] { model.hidden(good.slice(0, 0, 0)); });
  expect_error(ErrorKind::kUsage, {"[1, 7]", "[1, 8]"},
               [&] { model.loss(good, good.slice(1, 1)); });
  expect_error(ErrorKind::kData, {"53"}, [&] { model.hidden(good + 53); });
  expect_error(ErrorKind::kData, {"-1"}, [&] { model.hidden(good - 1); });
  expect_error(ErrorKind::kData, {"54", "53"}, [&] { model.loss(good, good + 54); });
  expect_error(ErrorKind::kData, {"-99", "53"}, [&] { model.token_nll(good, good - 99); });
  expect_error(ErrorKind::kUsage, {"Half"},
               [&] { CausalLM(config, Group(), make_exact_attention(), {.dtype = at::kHalf}); });
  expect_error(ErrorKind::kUsage, {"7", "6 attention heads"},
               [&] { parameter_layouts(config, 7, 0); });
  expect_error(ErrorKind::kStorage, {"/dev/null"}, [&] { model.save("/dev/null/model"); });
}

TEST(LlamaTest, SharesAreEvenAndComplete) {
  for (int64_t n : {0, 1, 3, 9, 53}) {
    for (int64_t parts : {1, 2, 3, 4}) {
      int64_t next = 0;
      for (int64_t i = 0; i < parts; ++i) {
        const IndexRange share = partition(n, parts, i);
        EXPECT_EQ(share.begin, next);
        EXPECT_GE(share.count, n / parts);
        EXPECT_LE(share.count, n / parts + 1);
        next += share.count;
      }
      EXPECT_EQ(next, n);
    }
  }
  EXPECT_EQ(partition(3, 2, 0).count, 2);  // 3 groups on 2 ranks = 2 + 1
}

}  // namespace
}  // namespace drrl::test
