#include "models/causal_lm/config.h"

#include <nlohmann/json.hpp>

#include "core/io/safetensors.h"
#include "tests/support/io_support.h"

namespace drrl {
namespace {

using nlohmann::json;
using test::expect_error;
using test::TemporaryDirectory;

json small_llama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"vocab_size", 100},
          {"hidden_size", 48},
          {"intermediate_size", 96},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 6},
          {"num_key_value_heads", 3},
          {"max_position_embeddings", 512},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 10000.0},
          {"hidden_act", "silu"},
          {"tie_word_embeddings", true},
          {"torch_dtype", "bfloat16"}};
}

ModelConfig parse(const json& value) {
  return ModelConfig::parse(value.dump(), "test/config.json");
}

json with(const char* field, const json& value, json base = small_llama()) {
  base[field] = value;
  return base;
}

TEST(ModelConfig, ReadsAndDerives) {
  const ModelConfig config = parse(small_llama());
  EXPECT_EQ(config.architecture, Architecture::kLlama);
  EXPECT_EQ(config.head_dim, 8);
  EXPECT_EQ(config.heads_per_group(), 2);
  EXPECT_EQ(config.max_position_embeddings, 512);
  EXPECT_DOUBLE_EQ(config.norm_eps, 1e-5);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_FALSE(config.qkv_bias || config.attention_output_bias || config.mlp_bias);
  EXPECT_EQ(config.dtype, "bfloat16");
  EXPECT_TRUE(config.warnings.empty()) << config.warnings.front();
  EXPECT_EQ(parse(with("head_dim", 16)).head_dim, 16);
  EXPECT_EQ(parse(with("head_dim", nullptr)).head_dim, 8);
  EXPECT_EQ(parse(with("num_key_value_heads", nullptr)).num_key_value_heads, 6);
  EXPECT_EQ(parse(with("hidden_act", "swish")).hidden_size, 48);
}

TEST(ModelConfig, ReadsTheFileOrItsDirectory) {
  const TemporaryDirectory folder;
  test::write_bytes(folder / "config.json", small_llama().dump());
  EXPECT_EQ(ModelConfig::load(folder.path()).vocab_size, 100);
  EXPECT_EQ(ModelConfig::load(folder / "config.json").vocab_size, 100);
  expect_error(ErrorKind::kModel, {"cannot look at", "too long"},
               [&] { ModelConfig::load(folder / std::string(5000, 'x')); });
  expect_error(ErrorKind::kModel, {"nowhere", "No such file"},
               [&] { ModelConfig::load(folder / "nowhere"); });
}

struct Refused {
  json config;
  std::vector<std::string> fragments;
};

std::vector<Refused> refused_shapes() {
  const auto without = [](const char* field) {
    json value = small_llama();
    value.erase(field);
    return value;
  };
  return {
      {json::array(), {"not a JSON object"}},
      {without("model_type"), {"no field \"model_type\"", "llama"}},
      {with("model_type", "gemma"), {"model_type is \"gemma\"", "supported are llama"}},
      {with("model_type", 3), {"model_type is 3", "string"}},
      {with("architectures", {"LlamaForSequenceClassification"}),
       {"architectures", "LlamaForSequenceClassification", "LlamaForCausalLM"}},
      {with("architectures", {"MistralForCausalLM"}), {"architectures", "LlamaForCausalLM"}},
      {without("vocab_size"), {"no field \"vocab_size\""}},
      {without("hidden_size"), {"\"hidden_size\""}},
      {without("intermediate_size"), {"\"intermediate_size\""}},
      {without("num_hidden_layers"), {"\"num_hidden_layers\""}},
      {without("num_attention_heads"), {"\"num_attention_heads\""}},
      {with("vocab_size", "100"), {"vocab_size is \"100\"", "integer"}},
      {with("vocab_size", 100.5), {"vocab_size is 100.5"}},
      {with("vocab_size", -1), {"vocab_size is -1"}},
      {with("hidden_size", 0), {"hidden_size is 0"}},
      {with("hidden_size", 18446744073709551615U), {"hidden_size is 18446744073709551615"}},
      {with("hidden_size", 49), {"hidden_size is 49", "num_attention_heads, 6"}},
      {with("head_dim", 7), {"head_dim is 7", "even"}},
      {with("num_key_value_heads", 4), {"num_key_value_heads is 4", "6 query heads"}},
      {with("num_key_value_heads", 0), {"num_key_value_heads is 0"}},
      {with("rms_norm_eps", 0), {"rms_norm_eps is 0"}},
      {with("rms_norm_eps", "1e-5"), {"rms_norm_eps is \"1e-5\""}},
      {with("hidden_act", "gelu"), {"hidden_act is \"gelu\"", "silu"}},
      {with("attention_dropout", 0.1), {"attention_dropout is 0.1", "dropout"}},
      {with("tie_word_embeddings", 1), {"tie_word_embeddings is 1", "true or false"}},
      {with("quantization_config", {{"quant_method", "gptq"}}),
       {"quantization_config", "gptq", "quantized"}},
      {with("auto_map", {{"AutoModel", "x.Y"}}), {"auto_map", "own code"}},
      {with("partial_rotary_factor", 0.5), {"partial_rotary_factor is 0.5", "only 1"}},
  };
}

std::vector<Refused> refused_rotations() {
  return {
      {with("rope_theta", 0), {"rope_theta is 0"}},
      {with("rope_scaling", 3), {"rope_scaling is 3", "object"}},
      {with("rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}),
       {"rope_scaling: type is \"dynamic\"", "llama3"}},
      {with("rope_scaling", {{"rope_type", "yarn"}, {"factor", 2.0}}), {"rope_type is \"yarn\""}},
      {with("rope_scaling", {{"type", "longrope"}}), {"longrope"}},
      {with("rope_scaling", {{"type", "linear"}}), {"rope_scaling", "\"factor\""}},
      {with("rope_scaling", {{"type", "linear"}, {"factor", 0}}), {"factor is 0"}},
      {with("rope_scaling", {{"rope_type", "llama3"},
                             {"factor", 8},
                             {"low_freq_factor", 4},
                             {"high_freq_factor", 4}}),
       {"high_freq_factor is 4", "more than low_freq_factor"}},
      {with("rope_scaling", {{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 1}}),
       {"\"high_freq_factor\""}},
      {with("rope_parameters", {{"rope_type", "proportional"}}),
       {"rope_parameters: rope_type is \"proportional\""}},
      {with("rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.25}}),
       {"partial_rotary_factor is 0.25"}},
      {with("rope_parameters", {{"full_attention", {{"rope_type", "linear"}, {"factor", 4.0}}}}),
       {"rope_parameters is", "full_attention", "one set of them"}},
      {with("rope_scaling", {{"rope_type", "default"}, {"sliding_attention", json::object()}}),
       {"rope_scaling is", "sliding_attention"}},
      {with("rope_parameters", {{"full_attention", json::object()}},
            with("rope_scaling", {{"type", "linear"}, {"factor", 2.0}})),
       {"rope_parameters is", "full_attention"}},
  };
}

std::vector<Refused> refused_families() {
  const json mistral = [] {
    json value = small_llama();
    value["model_type"] = "mistral";
    value["architectures"] = {"MistralForCausalLM"};
    return value;
  }();
  const json qwen2 = [] {
    json value = small_llama();
    value["model_type"] = "qwen2";
    value["architectures"] = {"Qwen2ForCausalLM"};
    return value;
  }();
  const json gpt2 = {
      {"model_type", "gpt2"}, {"vocab_size", 100}, {"n_embd", 48}, {"n_layer", 2}, {"n_head", 3}};
  return {
      {with("layer_types", {"full_attention", "sliding_attention"}),
       {"layer_types", "full_attention"}},
      {with("layer_types", {"chunked_attention"}, mistral), {"layer_types", "chunked_attention"}},
      {with("is_causal", false), {"is_causal is false", "both directions"}},
      {with("is_causal", false, gpt2), {"is_causal is false"}},
      {with("per_layer_config", {{"0", {{"intermediate_size", 9}}}}),
       {"per_layer_config", "differ from each other"}},
      {with("num_hidden_layers", 10'000'000), {"num_hidden_layers is 10000000", "to 16384"}},
      {with("vocab_size", INT32_MAX), {"vocab_size is 2147483647"}},
      {with("hidden_size", INT32_MAX), {"hidden_size is 2147483647"}},
      {with("intermediate_size", INT32_MAX), {"intermediate_size is 2147483647"}},
      {with("num_attention_heads", INT32_MAX), {"num_attention_heads is 2147483647"}},
      {with("num_key_value_heads", INT32_MAX), {"num_key_value_heads is 2147483647"}},
      {with("head_dim", INT32_MAX), {"head_dim is 2147483647"}},
      {with("n_embd", INT32_MAX, gpt2), {"n_embd is 2147483647"}},
      {with("n_layer", INT32_MAX, gpt2), {"n_layer is 2147483647"}},
      {with("n_head", INT32_MAX, gpt2), {"n_head is 2147483647"}},
      {with("n_inner", INT32_MAX, gpt2), {"n_inner is 2147483647"}},
      {with("sliding_window", 256, mistral), {"sliding_window is 256", "256 of 512"}},
      {with("max_position_embeddings", 8192, mistral),
       {"sliding_window is absent", "4096 of 8192"}},
      {with("attention_bias", true, mistral), {"attention_bias is true", "mistral models never"}},
      {with("attention_bias", false, qwen2), {"attention_bias is false", "qwen2 models always"}},
      {with("mlp_bias", true, qwen2), {"mlp_bias is true"}},
      {with("use_sliding_window", true, with("sliding_window", 128, qwen2)),
       {"sliding_window is 128"}},
      {with("use_sliding_window", true, with("max_position_embeddings", 8192, qwen2)),
       {"sliding_window is absent", "4096 of 8192"}},
      {with("layer_types", {"full_attention", "sliding_attention"}, qwen2),
       {"layer_types", "full_attention"}},
      {with("n_head", 5, gpt2), {"n_embd is 48", "n_head, 5"}},
      {with("n_head", 16, gpt2), {"n_embd / n_head is 3", "even"}},
      {with("n_embd", nullptr, gpt2), {"\"n_embd\""}},
      {with("hidden_size", 48, gpt2), {"hidden_size is 48", "n_embd"}},
      {with("activation_function", "relu", gpt2), {"activation_function is \"relu\"", "gelu_new"}},
      {with("scale_attn_weights", 1, gpt2), {"scale_attn_weights is 1"}},
      {with("add_cross_attention", true, gpt2), {"add_cross_attention is true"}},
      {with("attn_pdrop", "0.1", gpt2), {"attn_pdrop"}},
  };
}

TEST(ModelConfig, RefusesByName) {
  std::vector<Refused> cases = refused_shapes();
  for (std::vector<Refused> (*more)() : {&refused_rotations, &refused_families}) {
    const auto others = more();
    cases.insert(cases.end(), others.begin(), others.end());
  }
  for (const Refused& item : cases) {
    SCOPED_TRACE(item.config.dump());
    std::vector<std::string> fragments = item.fragments;
    fragments.emplace_back("test/config.json");
    expect_error(ErrorKind::kModel, fragments, [&] { parse(item.config); });
  }
  expect_error(ErrorKind::kModel, {"test/config.json", "nests deeper than 64"},
               [] {  // printing such a field would overflow the stack
                 const std::string deep = std::string(200'000, '[') + std::string(200'000, ']');
                 ModelConfig::parse("{\"model_type\": \"llama\", \"a\": " + deep + "}",
                                    "test/config.json");
               });
  EXPECT_NO_THROW(parse(with(
      "a",
      "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\\"[[")));  // in a
                                                                                           // string
  expect_error(ErrorKind::kModel, {"test/config.json", "not valid JSON"},
               [] { ModelConfig::parse("{\"a\":", "test/config.json"); });
}

json small_gpt2() {
  return {{"architectures", {"GPT2LMHeadModel"}},
          {"model_type", "gpt2"},
          {"vocab_size", 100},
          {"n_embd", 48},
          {"n_layer", 2},
          {"n_head", 3}};
}

TEST(ModelConfig, ReadsGpt2) {
  const ModelConfig config = parse(small_gpt2());
  EXPECT_EQ(config.architecture, Architecture::kGpt2);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.num_key_value_heads, 3);
  EXPECT_EQ(config.intermediate_size, 4 * 48);
  EXPECT_EQ(config.max_position_embeddings, 1024);
  EXPECT_DOUBLE_EQ(config.norm_eps, 1e-5);
  EXPECT_TRUE(config.tie_word_embeddings && config.qkv_bias && config.attention_output_bias &&
              config.mlp_bias);
  EXPECT_EQ(config.activation, Activation::kGeluTanh);
  EXPECT_EQ(config.score_factor(0), 1.0);
  EXPECT_EQ(config.score_factor(1), 1.0);
  EXPECT_EQ(config.inverse_frequencies().abs().max().item<float>(), 0.0F);
  ASSERT_EQ(config.warnings.size(), 1U);  // dropouts of 0.1 by default
  EXPECT_NE(config.warnings[0].find("resid_pdrop 0.1"), std::string::npos);

  json other = small_gpt2();
  other.update({{"n_inner", 60},
                {"n_positions", 32},
                {"n_ctx", 32},
                {"activation_function", "gelu"},
                {"scale_attn_weights", false},
                {"scale_attn_by_inverse_layer_idx", true},
                {"tie_word_embeddings", false},
                {"layer_norm_epsilon", 1e-6},
                {"resid_pdrop", 0},
                {"embd_pdrop", 0.0},
                {"attn_pdrop", 0},
                {"summary_type", "cls_index"}});
  const ModelConfig changed = parse(other);
  EXPECT_EQ(changed.intermediate_size, 60);
  EXPECT_EQ(changed.max_position_embeddings, 32);
  EXPECT_EQ(changed.activation, Activation::kGelu);
  EXPECT_DOUBLE_EQ(changed.score_factor(1), 4.0 / 2);
  EXPECT_FALSE(changed.tie_word_embeddings);
  EXPECT_TRUE(changed.warnings.empty()) << changed.warnings.front();
}

TEST(ModelConfig, NotesWhatItCannotJudge) {
  const ModelConfig config = parse(
      with("new_norm_trick", 3,
           with("bos_token_id", 1, with("unused_flag", false, with("pretraining_tp", 2)))));
  ASSERT_EQ(config.warnings.size(), 2U);
  EXPECT_NE(config.warnings[0].find("pretraining_tp"), std::string::npos);
  EXPECT_NE(config.warnings[1].find("new_norm_trick = 3"), std::string::npos);
  const ModelConfig twice = parse(
      with("rope_parameters", {{"rope_type", "default"}, {"rope_theta", 5e5}, {"mystery", 1}}));
  EXPECT_DOUBLE_EQ(twice.rope.theta, 5e5);
  ASSERT_EQ(twice.warnings.size(), 2U);
  EXPECT_NE(twice.warnings[0].find("rope_theta is given twice"), std::string::npos);
  EXPECT_NE(twice.warnings[1].find("mystery"), std::string::npos);
  const json linear = {{"rope_type", "linear"}, {"factor", 2.0}},
             plain = {{"rope_type", "default"}, {"rope_theta", 5e5}};
  const ModelConfig both = parse(with("rope_scaling", linear, with("rope_parameters", plain)));
  EXPECT_EQ(both.rope.kind, RopeKind::kLinear);
  ASSERT_EQ(both.warnings.size(), 1U);
  EXPECT_NE(both.warnings[0].find("rope_scaling is used"), std::string::npos) << both.warnings[0];
  EXPECT_TRUE(
      parse(with("rope_scaling", linear, with("rope_parameters", linear))).warnings.empty());
  const ModelConfig types = parse(
      with("rope_scaling", {{"rope_type", "linear"}, {"type", "llama3"}, {"factor", 2.0}}));
  EXPECT_EQ(types.rope.kind, RopeKind::kLinear);
  ASSERT_EQ(types.warnings.size(), 1U);
  EXPECT_NE(types.warnings[0].find("the type \"llama3\" and the rope_type \"linear\""),
            std::string::npos)
      << types.warnings[0];
  const json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 256}};
  const ModelConfig positions = parse(
      with("original_max_position_embeddings", 128, with("rope_scaling", llama3)));
  EXPECT_EQ(positions.rope.original_max_position_embeddings, 128);
  ASSERT_EQ(positions.warnings.size(), 1U);
  EXPECT_NE(positions.warnings[0].find("as 128 and in rope_scaling as 256; the former"),
            std::string::npos)
      << positions.warnings[0];
  EXPECT_TRUE(
      parse(with("is_causal", true, with("layer_types", {"full_attention", "full_attention"})))
          .warnings.empty());
}

// The largest sizes that are taken: the number of weights does not overflow.
TEST(ModelConfig, CountsTheWeightsOfTheLargestSizes) {
  json most = small_llama();
  most.update({{"num_hidden_layers", 1 << 14},
               {"vocab_size", 1 << 28},
               {"hidden_size", 1 << 20},
               {"intermediate_size", 1 << 22},
               {"num_attention_heads", 1 << 16},
               {"num_key_value_heads", 1 << 16},
               {"head_dim", 64},
               {"tie_word_embeddings", false}});
  EXPECT_GT(static_cast<double>(parse(most).parameter_count()), 4e17);
}

TEST(ModelConfig, ExportKeepsEveryFieldButTheDtype) {
  const json original = with("new_norm_trick", 3);
  const ModelConfig config = parse(original);
  EXPECT_EQ(json::parse(config.export_json(at::kFloat)), with("torch_dtype", "float32", original));
  EXPECT_EQ(json::parse(parse(with("dtype", "float16")).export_json(at::kBFloat16)),
            with("dtype", "bfloat16", with("torch_dtype", "bfloat16")));
  const json stated = json::parse(parse([] {
                                    json value = small_llama();
                                    value.erase("torch_dtype");
                                    return value;
                                  }())
                                      .export_json(at::kHalf));
  EXPECT_EQ(stated.at("torch_dtype"), "float16");
  ModelConfig untied = parse(original);
  untied.tie_word_embeddings = false;  // as load_model_config finds some
  EXPECT_EQ(json::parse(untied.export_json(at::kFloat)),
            with("torch_dtype", "float32", with("tie_word_embeddings", false, original)));
  // The order of the fields is kept too.
  const std::string
      text = ModelConfig::parse(
                 R"({"vocab_size":9,"model_type":"llama","hidden_size":4,"intermediate_size":4,)"
                 R"("num_hidden_layers":1,"num_attention_heads":1,"a":1})",
                 "x")
                 .export_json(at::kFloat);
  EXPECT_LT(text.find("vocab_size"), text.find("model_type"));
  EXPECT_LT(text.find("num_attention_heads"), text.find("\"a\""));
}

// Transformers itself reads the same files and says what it made of them: sizes, biases, number of
// weights, and RoPE's frequencies bit for bit.
TEST(ModelConfig, AgreesWithTransformers) {
  if (std::string(DRRL_PYTHON).empty()) {
    GTEST_SKIP() << "no Python with Transformers";
  }
  const TemporaryDirectory folder;
  test::run_oracle("configs '" + folder.path().string() + "'");
  const auto cases = test::listing(folder.path());
  EXPECT_GE(cases.size(), 12U);
  for (const std::string& item : cases) {
    SCOPED_TRACE(item);
    const ModelConfig config = ModelConfig::load(folder / item);
    const json truth = json::parse(test::read_bytes(folder / item / "truth.json"));
    EXPECT_EQ(config.vocab_size, truth.at("vocab_size"));
    EXPECT_EQ(config.hidden_size, truth.at("hidden_size"));
    EXPECT_EQ(config.num_key_value_heads, truth.at("num_key_value_heads"));
    EXPECT_EQ(config.head_dim, truth.at("head_dim"));
    EXPECT_EQ(config.max_position_embeddings, truth.at("max_position_embeddings"));
    EXPECT_EQ(config.norm_eps, truth.at("rms_norm_eps"));
    EXPECT_EQ(config.initializer_range, truth.at("initializer_range"));
    EXPECT_EQ(config.tie_word_embeddings, truth.at("tie_word_embeddings"));
    EXPECT_EQ(config.rope.theta, truth.at("rope_theta"));
    EXPECT_EQ(config.qkv_bias, truth.at("qkv_bias"));
    EXPECT_EQ(config.attention_output_bias, truth.at("attention_output_bias"));
    EXPECT_EQ(config.mlp_bias, truth.at("mlp_bias"));
    EXPECT_EQ(config.parameter_count(), truth.at("parameters"));
    const at::Tensor expected = SafetensorsFile(folder / item / "rope.safetensors")
                                    .tensor("inv_freq");
    const at::Tensor actual = config.inverse_frequencies();
    EXPECT_TRUE(at::equal(actual, expected))
        << "largest relative difference "
        << ((actual - expected) / expected).abs().max().item<double>();
  }
}

}  // namespace
}  // namespace drrl
