// Token-by-token generation on 1, 2 and 3 tensor-parallel ranks, against passes over the whole
// sequence.
#include "models/causal_lm/generate.h"

#include "core/error.h"
#include "policy/attention/lowrank_controller.h"
#include "tests/support/io_support.h"
#include "tests/support/reference_llama.h"
#include "tests/support/tensor_parallel_fixture.h"

namespace drrl::test {
namespace {

constexpr int64_t kLength = 91;
constexpr int64_t kLevels = 8;  // at least those of any length here

class GenerationTest : public TensorParallelTest {
 protected:
  static std::vector<ModelConfig> configs() {
    std::vector<ModelConfig> both = {small_config(), small_gpt2_config()};
    for (ModelConfig& config : both) {
      config.max_position_embeddings = 128;
    }
    return both;
  }
  CausalLM model(const ModelConfig& config, std::shared_ptr<AttentionController> attention,
                 ModelOptions options = {}) const {
    CausalLM result(config, tp_, std::move(attention), options);
    set_weights(result, random_weights(config, 1), tp_);
    return result;
  }
};

TEST_F(GenerationTest, EveryStepEqualsThePassOverTheWholeSequence) {
  // Across borders of sinks, blocks and levels; single tokens, prompts that end before, at and
  // after a border, and a prompt in parts.
  const std::vector<std::vector<int64_t>> prompts = {{1}, {34, 1, 1, 5}, {42}, {66, 17}};
  for (const ModelConfig& config : configs()) {
    const Text text = random_text(config, 2, kLength);
    for (const Geometry geometry :
         size_ == 1 ? std::vector<Geometry>{{8, 2}, {16, 0}} : std::vector<Geometry>{{8, 2}}) {
      for (const auto& policy : rank_policies(kLevels)) {
        CausalLM m = model(config, std::make_shared<LowRankController>(policy, geometry));
        const at::Tensor whole = m.logits(text.tokens);
        for (const std::vector<int64_t>& prompt : prompts) {
          SCOPED_TRACE(c10::str(name(config.architecture), ", ", policy->describe(), ", blocks of ",
                                geometry.near_block, ", prompt ", prompt));
          const auto cache = m.make_cache(kLength);
          double largest = 0;
          for (size_t call = 0; cache->length() < kLength; ++call) {
            const int64_t count = call < prompt.size() ? prompt[call] : 1;
            const at::Tensor next = m.extend(text.tokens.narrow(1, cache->length(), count), *cache);
            largest = std::max(
                largest, (next - whole.select(1, cache->length() - 1)).abs().max().item<double>());
          }
          EXPECT_LE(largest, 1e-4);
        }
      }
    }
  }
}

TEST_F(GenerationTest, WorksInEveryPrecisionAndWithPlainExactAttention) {
  const ModelConfig config = configs()[0];
  const Text text = random_text(config, 1, kLength);
  for (const auto& [dtype, tolerance] : {std::pair(at::kDouble, 1e-9), {at::kBFloat16, 5e-2}}) {
    for (const auto& attention :
         {make_exact_attention(),
          std::shared_ptr<AttentionController>(
              std::make_shared<LowRankController>(make_fixed_policy(8, 16), Geometry{8, 2}))}) {
      CausalLM m = model(config, attention, {.dtype = dtype});
      const at::Tensor whole = m.logits(text.tokens);
      const auto cache = m.make_cache(kLength);
      at::Tensor next = m.extend(text.tokens.narrow(1, 0, 50), *cache);
      while (cache->length() < kLength) {
        next = m.extend(text.tokens.narrow(1, cache->length(), 1), *cache);
      }
      EXPECT_LE(relative_error(next, whole.select(1, kLength - 1)), tolerance) << dtype;
    }
  }
}

TEST_F(GenerationTest, GreedyTakesTheMostLikelyToken) {
  for (const ModelConfig& config : configs()) {
    const Text text = random_text(config, 1, 30);
    CausalLM m = model(
        config, std::make_shared<LowRankController>(make_fixed_policy(6, 16), Geometry{8, 2}));
    const Generation made = generate(m, text.tokens[0], {.tokens = 40});
    EXPECT_EQ(made.cached_tokens, 30 + 39);
    const at::Tensor all = at::cat({text.tokens, made.tokens.unsqueeze(0)}, 1);
    const at::Tensor expected = m.logits(all).argmax(2).slice(1, 29, 69);
    EXPECT_TRUE(made.tokens.equal(expected[0])) << made.tokens << expected[0];
    EXPECT_TRUE(generate(m, text.tokens[0], {.tokens = 40, .temperature = 2.0, .top_k = 1})
                    .tokens.equal(made.tokens));
  }
}

TEST_F(GenerationTest, DrawsFollowTheSeed) {
  const ModelConfig config = configs()[0];
  const Text text = random_text(config, 1, 10);
  CausalLM m = model(config, make_exact_attention());
  const auto draw = [&](uint64_t seed, double temperature) {
    at::Tensor tokens = generate(
                            m, text.tokens[0],
                            {.tokens = 30, .temperature = temperature, .top_k = 20, .seed = seed})
                            .tokens;
    at::Tensor first = tokens.clone();
    tp_.broadcast(first);
    EXPECT_TRUE(first.equal(tokens));  // all ranks drew the same
    return tokens;
  };
  EXPECT_TRUE(draw(1, 1.0).equal(draw(1, 1.0)));
  EXPECT_FALSE(draw(1, 1.0).equal(draw(2, 1.0)));
  EXPECT_FALSE(draw(1, 1.0).equal(draw(1, 100.0)));
}

TEST_F(GenerationTest, RefusesWhatDoesNotFit) {
  const ModelConfig config = configs()[1];
  CausalLM m = model(config, make_exact_attention());
  const at::Tensor prompt = at::zeros({100}, at::kLong);
  expect_error(ErrorKind::kUsage, {"129", "128"}, [&] { generate(m, prompt, {.tokens = 29}); });
  expect_error(ErrorKind::kUsage, {"0"}, [&] { generate(m, prompt, {.tokens = 0}); });
  expect_error(ErrorKind::kUsage, {"-1"},
               [&] { generate(m, prompt, {.tokens = 1, .temperature = -1}); });
  expect_error(ErrorKind::kUsage, {"-2"}, [&] { generate(m, prompt, {.tokens = 1, .top_k = -2}); });
  const auto cache = m.make_cache(101);
  m.extend(prompt.unsqueeze(0), *cache);
  expect_error(ErrorKind::kUsage, {"101", "100", "2 more"},
               [&] { m.extend(prompt.slice(0, 0, 2).unsqueeze(0), *cache); });
}

}  // namespace
}  // namespace drrl::test
