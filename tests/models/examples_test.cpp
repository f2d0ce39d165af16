// Examples for drrl-eval --examples: what a file may hold, and scores on 1, 2 and 3 tensor-parallel ranks against the logits of the whole sequence.
#include "models/examples.h"
#include "core/error.h"
#include "policy/controller.h"
#include "tests/models/io_support.h"
#include "tests/models/reference_llama.h"
#include "tests/models/tensor_parallel_fixture.h"

namespace drrl::test {
namespace {

class ExamplesTest : public TensorParallelTest {
 protected:
  ExamplesTest() { config_.max_position_embeddings = 128; }

  CausalLM model(std::shared_ptr<AttentionController> attention) const {
    CausalLM result(config_, tp_, std::move(attention));
    set_weights(result, random_weights(config_, 1), tp_);
    return result;
  }

  ModelConfig config_ = small_config();
};

/// What the model itself says after `context`, token by token.
at::Tensor own_words(CausalLM& model, const at::Tensor& context, int64_t count) {
  at::Tensor tokens = context;
  for (int64_t i = 0; i < count; ++i) {
    tokens = at::cat({tokens, model.logits(tokens.unsqueeze(0)).select(1, -1).argmax(1)});
  }
  return tokens.narrow(0, context.numel(), count);
}

TEST_F(ExamplesTest, LogprobsAreThoseOfTheLogitsAndTheModelsOwnWordsAreRight) {
  const at::Tensor context = random_text(config_, 1, 70).tokens[0];
  for (const auto& policy : rank_policies(/*levels=*/8)) {
    SCOPED_TRACE(policy->describe());
    CausalLM m = model(std::make_shared<LowRankController>(policy, Geometry{8, 2}));
    const at::Tensor own = own_words(m, context, 3);
    at::Tensor other = own.clone();
    other[1] = (other[1].item<int64_t>() + 1) % config_.vocab_size;

    const ExampleScore said = score(m, {.id = "own", .context = context, .targets = {own}});
    EXPECT_TRUE(said.right);
    // Sequences of another length may be given other ranks, so the oracle sees exactly context and target but its last token.
    const at::Tensor logprobs = m.logits(at::cat({context, own.narrow(0, 0, 2)}).unsqueeze(0))[0].narrow(0, 69, 3).log_softmax(1);
    EXPECT_NEAR(said.logprobs.at(0), logprobs.gather(1, own.unsqueeze(1)).sum().item<double>(), 1e-4);
    EXPECT_FALSE(score(m, {.id = "other", .context = context, .targets = {other}}).right) << "one wrong token of three is wrong";

    const ExampleScore choice = score(m, {.id = "choice", .context = context, .targets = {other, own}, .answer = 1});
    EXPECT_EQ(choice.right, choice.logprobs.at(1) > choice.logprobs.at(0));
    EXPECT_NE(choice.right, score(m, {.id = "choice", .context = context, .targets = {other, own}, .answer = 0}).right);
    EXPECT_NEAR(choice.logprobs.at(1), said.logprobs.at(0), 1e-6);
    EXPECT_FALSE(score(m, {.id = "tie", .context = context, .targets = {own, own}, .answer = 0}).right);
  }
}

TEST_F(ExamplesTest, ATieForTheMostLikelyTokenIsWrong) {
  CausalLM m(config_, tp_, make_full_attention());  // weights of zero: all tokens are as likely
  const ExampleScore scored = score(m, {.id = "0", .context = at::zeros({5}, at::kLong), .targets = {at::zeros({2}, at::kLong)}});
  EXPECT_FALSE(scored.right);
  EXPECT_NEAR(scored.logprobs.at(0), -2 * std::log(static_cast<double>(config_.vocab_size)), 1e-4);
}

TEST_F(ExamplesTest, LogitsOfTheLastRows) {
  CausalLM m = model(std::make_shared<LowRankController>(make_fixed_policy(6, 16), Geometry{8, 2}));
  const at::Tensor tokens = random_text(config_, 2, 40).tokens;
  const at::Tensor all = m.logits(tokens);
  for (const int64_t last : {1, 7, 40}) {
    EXPECT_LE((m.logits(tokens, last) - all.narrow(1, 40 - last, last)).abs().max().item<double>(), 1e-5) << last;
  }
  expect_error(ErrorKind::kUsage, {"41", "40"}, [&] { m.logits(tokens, 41); });
}

TEST_F(ExamplesTest, UnderBf16TheHeadOfTheLastRowsIsInFp32) {
  CausalLM m(config_, tp_, make_full_attention(), {.dtype = at::kBFloat16});
  set_weights(m, random_weights(config_, 1), tp_);
  const at::Tensor tokens = random_text(config_, 1, 40).tokens;
  const at::Tensor all = m.logits(tokens), last = m.logits(tokens, 40);
  const auto rounded = [](const at::Tensor& x) { return x.to(at::kBFloat16).to(at::kFloat); };
  EXPECT_TRUE(all.equal(rounded(all)));
  EXPECT_FALSE(last.equal(rounded(last)));
  EXPECT_LE((last - all).abs().max().item<double>(), 0.01 * all.abs().max().item<double>());
}

TEST_F(ExamplesTest, TargetsOfOneTokenShareAPass) {
  const auto controller = std::make_shared<LowRankController>(make_fixed_policy(6, 16), Geometry{8, 2});
  CausalLM m = model(controller);
  const at::Tensor context = random_text(config_, 1, 40).tokens[0];
  const auto token = [](int64_t id) { return at::full({1}, id, at::kLong); };
  const auto passes = [&](std::vector<at::Tensor> targets) {
    controller->take_statistics();
    const ExampleScore scored = score(m, {.id = "0", .context = context, .targets = targets});
    const int64_t calls = controller->take_statistics().calls;
    for (size_t i = 0; i < targets.size(); ++i) {
      EXPECT_EQ(scored.logprobs[i], score(m, {.id = "1", .context = context, .targets = {targets[i]}}).logprobs[0]);
    }
    return calls / config_.num_hidden_layers;
  };
  EXPECT_EQ(passes({token(1), token(2), token(3)}), 1);
  EXPECT_EQ(passes({at::tensor({1, 2}, at::kLong), at::tensor({1, 3}, at::kLong), at::tensor({2, 3}, at::kLong)}), 2);
  EXPECT_EQ(passes({token(1), at::tensor({1, 2}, at::kLong)}), 2);
}

TEST_F(ExamplesTest, WhatTheModelRefusesNamesTheExample) {
  CausalLM m = model(make_full_attention());
  expect_error(ErrorKind::kData, {"example 'seven'", "4 tokens", std::to_string(config_.vocab_size)},
               [&] { score(m, {.id = "seven", .context = at::full({4}, config_.vocab_size, at::kLong), .targets = {at::zeros({1}, at::kLong)}}); });
}

TEST_F(ExamplesTest, FilesAreRead) {
  const TemporaryDirectory folder;
  write_bytes(folder / "a.jsonl", "{\"id\": \"a\", \"context\": [1, 2, 3], \"targets\": [[4], [5, 6]], \"answer\": 1, \"depth\": 0.5}\n\n"
                                  "{\"answer\": 0, \"targets\": [[0]], \"context\": [7], \"id\": \"b\"}");
  const std::vector<Example> examples = read_examples(folder / "a.jsonl", config_);
  ASSERT_EQ(examples.size(), 2U);
  EXPECT_EQ(examples[0].id, "a");
  EXPECT_TRUE(examples[0].context.equal(at::tensor({1, 2, 3}, at::kLong)));
  ASSERT_EQ(examples[0].targets.size(), 2U);
  EXPECT_TRUE(examples[0].targets[1].equal(at::tensor({5, 6}, at::kLong)));
  EXPECT_EQ(examples[0].answer, 1);
  EXPECT_EQ(examples[1].id, "b");
}

TEST_F(ExamplesTest, WhatIsWrongIsNamedWithFileAndLine) {
  const TemporaryDirectory folder;
  const std::string good = R"({"id": "a", "context": [1], "targets": [[2]], "answer": 0})";
  const auto refuses = [&](const std::string& line, const std::vector<std::string>& fragments) {
    write_bytes(folder / "bad.jsonl", good + "\n" + line + "\n");
    std::vector<std::string> all = {"bad.jsonl:2"};
    all.insert(all.end(), fragments.begin(), fragments.end());
    expect_error(ErrorKind::kData, all, [&] { read_examples(folder / "bad.jsonl", config_); });
  };
  const std::string vocabulary = std::to_string(config_.vocab_size);
  refuses("{", {"not a JSON object"});
  refuses("[1]", {"not a JSON object"});
  refuses(R"({"id": "b", "context": [1], "targets": [[2]]})", {"no 'answer'"});
  refuses(R"({"id": 3, "context": [1], "targets": [[2]], "answer": 0})", {"'id'", "3", "string"});
  refuses(R"({"id": "b", "context": [], "targets": [[2]], "answer": 0})", {"'context'", "empty"});
  refuses(R"({"id": "b", "context": [1, )" + vocabulary + R"(], "targets": [[2]], "answer": 0})", {"'context'", vocabulary, "[0, " + vocabulary + ")"});
  refuses(R"({"id": "b", "context": [-1], "targets": [[2]], "answer": 0})", {"'context'", "-1"});
  refuses(R"({"id": "b", "context": [18446744073709551615], "targets": [[2]], "answer": 0})", {"18446744073709551615"});
  refuses(R"({"id": "b", "context": [1.5], "targets": [[2]], "answer": 0})", {"1.5", "whole number"});
  refuses(R"({"id": "b", "context": [1], "targets": [], "answer": 0})", {"'targets'"});
  refuses(R"({"id": "b", "context": [1], "targets": [[2], []], "answer": 0})", {"target 1", "empty"});
  refuses(R"({"id": "b", "context": [1], "targets": [[2], [3]], "answer": 2})", {"'answer'", "2", "[0, 2)"});
  refuses(good, {"id 'a'", "line 1"});
  std::string many = "1";
  for (int64_t i = 1; i < config_.max_position_embeddings; ++i) {
    many += ",1";
  }
  refuses(R"({"id": "b", "context": [)" + many + R"(], "targets": [[2, 3]], "answer": 0})", {"128", "max_position_embeddings"});
  write_bytes(folder / "fits.jsonl", R"({"id": "b", "context": [)" + many + R"(], "targets": [[2]], "answer": 0})");
  EXPECT_EQ(read_examples(folder / "fits.jsonl", config_).size(), 1U) << "the last token of a target takes no position";
  write_bytes(folder / "none.jsonl", "\n");
  expect_error(ErrorKind::kData, {"none.jsonl", "no examples"}, [&] { read_examples(folder / "none.jsonl", config_); });
  expect_error(ErrorKind::kData, {"nowhere"}, [&] { read_examples(folder / "nowhere.jsonl", config_); });
}

}  // namespace
}  // namespace drrl::test
