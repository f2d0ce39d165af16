// The model on 2, 3 and 4 tensor-parallel ranks, with uneven shares of everything, against the
// plain reference on the whole.
#include "models/causal_lm/tensor_parallel.h"

#include <regex>

#include "core/error.h"
#include "models/causal_lm/causal_lm.h"
#include "models/training/gradient_reducer.h"
#include "tests/support/io_support.h"
#include "tests/support/reference_llama.h"
#include "tests/support/tensor_parallel_fixture.h"

namespace drrl::test {
namespace {

class TensorParallel : public TensorParallelTest {
 protected:
  // 3 groups on 2 ranks are 2 + 1, on 3 ranks 1 each; 4 ranks get 5 groups, 2 + 1 + 1 + 1.
  ModelConfig config() const {
    ModelConfig config = size_ < 4 ? small_config(6, 3) : small_config(10, 5);
    config.qkv_bias = config.attention_output_bias = config.mlp_bias = true;
    return config;
  }
  // The last one has fewer KV heads than ranks: on 2 ranks 3 query heads of one are 2 + 1; on 3 and
  // 4 ranks {0 1} {2} and {0 1} {2 3} share.
  std::vector<ModelConfig> configs() const {
    ModelConfig few = config();
    few.num_key_value_heads = size_ == 2 ? 1 : 2;
    few.num_attention_heads = 3 * few.num_key_value_heads;
    return {config(), small_gpt2_config(size_ < 4 ? 3 : 5), few};
  }

  // A folder that all ranks know; rank 0 made it and removes it.
  std::filesystem::path shared_folder() {
    std::array<char, 256> path{};
    if (rank_ == 0) {
      folder_ = std::make_unique<TemporaryDirectory>();
      std::snprintf(path.data(), path.size(), "%s", folder_->path().c_str());
    }
    MPI_Bcast(path.data(), static_cast<int>(path.size()), MPI_CHAR, 0, MPI_COMM_WORLD);
    return path.data();
  }

  std::unique_ptr<TemporaryDirectory> folder_;
};

TEST_F(TensorParallel, LossAndEveryGradientEqualTheReference) {
  for (const auto& [tied, checkpoint] :
       {std::pair(true, false), {true, true}, {false, false}, {false, true}}) {
    for (ModelConfig whole : configs()) {
      whole.tie_word_embeddings = tied;
      const Weights weights = random_weights(whole, 1);
      const Text text = random_text(whole, 2, 19);
      const at::Tensor expected = reference_logits(whole, weights, text.tokens);
      const at::Tensor nll = reference_nll(expected, text.labels);
      nll.sum().backward();

      for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
        const double close = dtype == at::kDouble ? 1e-9 : 1e-5;
        CausalLM model(whole, tp_, make_exact_attention(),
                       {.dtype = dtype, .activation_checkpoint = checkpoint, .loss_chunk_rows = 7});
        set_weights(model, weights, tp_);
        EXPECT_LE(relative_error(model.logits(text.tokens), expected), close);
        EXPECT_LE(relative_error(model.token_nll(text.tokens, text.labels), nll), 1e-5);
        const LossResult result = model.loss(text.tokens, text.labels, 0.5);
        EXPECT_LE(relative_error(result.loss_sum, nll.sum()), close);
        result.loss_sum.backward();
        sum_shared_rows(model.parameters(), make_kv(whole.num_key_value_heads));
        expect_gradients(model, weights, tp_, 0.5, close);
      }
    }
  }
}

TEST_F(TensorParallel, ReplicatedParametersHaveTheSameGradientBitForBit) {
  for (const ModelConfig& whole : configs()) {
    CausalLM model(whole, tp_, make_exact_attention());
    model.initialize(4);
    const Text text = random_text(whole, 2, 19);
    model.loss(text.tokens, text.labels).loss_sum.backward();
    int64_t replicated = 0;
    for (const Parameter& parameter : model.parameters()) {
      if (!parameter.sharded) {
        ++replicated;
        at::Tensor first = parameter.value.grad().clone();
        tp_.broadcast(first);
        EXPECT_TRUE(first.equal(parameter.value.grad())) << parameter.name;
      }
    }
    // Llama: two norms, o_proj.bias and down_proj.bias a layer; the final norm. GPT-2: biases of
    // norms as well, and the positions.
    EXPECT_EQ(replicated, whole.is_gpt2() ? 2 * 6 + 3 : 2 * 4 + 1);
  }
}

TEST_F(TensorParallel, Bfloat16IsCloseToOneProcess) {
  CausalLM one(config(), Group(), make_exact_attention(), {.dtype = at::kBFloat16});
  CausalLM many(config(), tp_, make_exact_attention(), {.dtype = at::kBFloat16});
  const Weights weights = random_weights(config(), 1);
  set_weights(one, weights, Group());
  set_weights(many, weights, tp_);
  const Text text = random_text(config(), 2, 19);
  EXPECT_LE(relative_error(many.loss(text.tokens, text.labels).loss_sum,
                           one.loss(text.tokens, text.labels).loss_sum),
            1e-2);
}

TEST_F(TensorParallel, InitializesShardsOfOneModel) {
  for (const ModelConfig& whole : configs()) {
    CausalLM one(whole, Group(), make_exact_attention());
    CausalLM many(whole, tp_, make_exact_attention());
    one.initialize(9);
    many.initialize(9);
    const Text text = random_text(whole, 1, 19);
    EXPECT_LE(relative_error(many.logits(text.tokens), one.logits(text.tokens)), 1e-5);
  }
}

TEST_F(TensorParallel, SavesOneModelAndLoadsItsShards) {
  const int64_t groups = size_ < 4 ? 3 : 5;
  const std::string llama = c10::str(
      R"({"model_type": "llama", )"
      R"("architectures": ["LlamaForCausalLM"], "hidden_act": "silu", )"
      R"("vocab_size": 53, "hidden_size": 40,
               "intermediate_size": 37, "num_hidden_layers": 2, "head_dim": 16, )"
      R"("max_position_embeddings": 64, "rms_norm_eps": 1e-5,
               "rope_theta": 1000.0, "attention_bias": true, "mlp_bias": true, )"
      R"("tie_word_embeddings": false, "num_attention_heads": )",
      2 * groups, R"(, "num_key_value_heads": )", groups, "}");
  const std::string gpt2 = c10::str(
      R"({"model_type": "gpt2", "vocab_size": 53, "n_inner": 37, "n_layer": 2, )"
      R"("n_positions": 64, "n_head": )",
      groups, R"(, "n_embd": )", 16 * groups, "}");
  // One KV head of all ranks.
  const std::string shared = std::regex_replace(
      llama, std::regex("\"num_key_value_heads\": [0-9]+"), "\"num_key_value_heads\": 1");
  const std::filesystem::path folder = shared_folder();
  for (const std::string& json : {llama, gpt2, shared}) {
    const ModelConfig parsed = ModelConfig::parse(json, "test");
    const std::filesystem::path to = folder / c10::str(name(parsed.architecture),
                                                       parsed.num_key_value_heads);
    const Weights weights = random_weights(parsed, 1);
    CausalLM saved(parsed, tp_, make_exact_attention());
    set_weights(saved, weights, tp_);
    saved.save(to);
    const Text text = random_text(parsed, 1, 19);

    CausalLM one(parsed, Group(), make_exact_attention());
    one.load(to);
    EXPECT_LE(
        relative_error(one.logits(text.tokens), reference_logits(parsed, weights, text.tokens)),
        1e-5);
    CausalLM many(parsed, tp_, make_exact_attention());
    many.load(to);
    for (size_t i = 0; i < many.parameters().size(); ++i) {
      EXPECT_TRUE(many.parameters()[i].value.equal(saved.parameters()[i].value))
          << many.parameters()[i].name;
    }
  }
}

TEST_F(TensorParallel, OneRankThatCannotSaveStopsAll) {
  CausalLM model(config(), tp_, make_exact_attention());
  expect_error(ErrorKind::kStorage, {}, [&] { model.save("/dev/null/model"); });
}

TEST_F(TensorParallel, SharedRowsHaveTheSameGradientBitForBitAndCountOnce) {
  const ModelConfig few = configs().back();
  const Group kv = make_kv(few.num_key_value_heads);
  CausalLM model(few, tp_, make_exact_attention());
  CausalLM alone(few, Group(), make_exact_attention());
  model.initialize(4);
  alone.initialize(4);
  const Text text = random_text(few, 2, 19);
  model.loss(text.tokens, text.labels).loss_sum.backward();
  alone.loss(text.tokens, text.labels).loss_sum.backward();
  if (kv.size() > 1) {
    expect_error(ErrorKind::kUsage, {"KV head"},
                 [&] { sum_shared_rows(model.parameters(), Group()); });
  }
  sum_shared_rows(model.parameters(), kv);
  int64_t shared = 0;
  for (const Parameter& parameter : model.parameters()) {
    if (parameter.shared_rows > 0) {
      ++shared;
      const at::Tensor rows = parameter.value.grad().narrow(
          0, parameter.value.size(0) - parameter.shared_rows, parameter.shared_rows);
      at::Tensor first = rows.clone();
      kv.broadcast(first);
      EXPECT_TRUE(first.equal(rows)) << parameter.name;
    }
  }
  EXPECT_EQ(shared, kv.size() > 1 ? 2 * 2 : 0) << "weight and bias of qkv_proj, a layer";
  at::Tensor squares = squared_gradient_norm(model.parameters(), tp_, kv);
  tp_.all_reduce(squares);
  EXPECT_NEAR(
      squares.item<double>() / squared_gradient_norm(alone.parameters(), Group()).item<double>(), 1,
      1e-5);
}

TEST_F(TensorParallel, RefusesMoreRanksThanHeads) {
  ModelConfig few = small_config(1, 1);
  expect_error(ErrorKind::kUsage, {"1 attention heads", std::to_string(size_)},
               [&] { CausalLM(few, tp_, make_exact_attention()); });
}

}  // namespace
}  // namespace drrl::test
