// Examples for drrl-eval --examples: what a file may hold, and scores on 1, 2 and 3 tensor-parallel
// ranks against the logits of the whole sequence.
#include "models/data/examples.h"

#include <sys/stat.h>

#include "core/error.h"
#include "policy/attention/lowrank_controller.h"
#include "tests/support/io_support.h"
#include "tests/support/reference_llama.h"
#include "tests/support/tensor_parallel_fixture.h"

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

/// What follows `context`?
Example asking(const std::string& id, const at::Tensor& context,
               const std::vector<at::Tensor>& targets, int64_t answer = 0) {
  return {.id = id,
          .context = context,
          .questions = {{.at = context.numel(), .targets = targets, .answer = answer}}};
}

TEST_F(ExamplesTest, LogprobsAreThoseOfTheLogitsAndTheModelsOwnWordsAreRight) {
  const at::Tensor context = random_text(config_, 1, 70).tokens[0];
  for (const auto& policy : rank_policies(/*levels=*/8)) {
    SCOPED_TRACE(policy->describe());
    CausalLM m = model(std::make_shared<LowRankController>(policy, Geometry{8, 2}));
    const at::Tensor own = own_words(m, context, 3);
    at::Tensor other = own.clone();
    other[1] = (other[1].item<int64_t>() + 1) % config_.vocab_size;

    const QuestionScore said = score(m, asking("own", context, {own})).at(0);
    EXPECT_TRUE(said.right);
    // Sequences of another length may be given other ranks, so the oracle sees exactly context and
    // target but its last token.
    const at::Tensor logprobs = m.logits(at::cat({context, own.narrow(0, 0, 2)}).unsqueeze(0))[0]
                                    .narrow(0, 69, 3)
                                    .log_softmax(1);
    EXPECT_NEAR(said.logprobs.at(0), logprobs.gather(1, own.unsqueeze(1)).sum().item<double>(),
                1e-4);
    EXPECT_FALSE(score(m, asking("other", context, {other})).at(0).right)
        << "one wrong token of three is wrong";

    const QuestionScore choice = score(m, asking("choice", context, {other, own}, 1)).at(0);
    EXPECT_EQ(choice.right, choice.logprobs.at(1) > choice.logprobs.at(0));
    EXPECT_NE(choice.right, score(m, asking("choice", context, {other, own}, 0)).at(0).right);
    EXPECT_NEAR(choice.logprobs.at(1), said.logprobs.at(0), 1e-6);
    EXPECT_FALSE(score(m, asking("tie", context, {own, own})).at(0).right);
  }
}

TEST_F(ExamplesTest, ATieForTheMostLikelyTokenIsWrong) {
  CausalLM m(config_, tp_, make_exact_attention());  // weights of zero: all tokens are as likely
  const QuestionScore
      scored = score(m, asking("0", at::zeros({5}, at::kLong), {at::zeros({2}, at::kLong)})).at(0);
  EXPECT_FALSE(scored.right);
  EXPECT_NEAR(scored.logprobs.at(0), -2 * std::log(static_cast<double>(config_.vocab_size)), 1e-4);
}

TEST_F(ExamplesTest, LogitsAtPositions) {
  CausalLM m = model(std::make_shared<LowRankController>(make_fixed_policy(6, 16), Geometry{8, 2}));
  const at::Tensor tokens = random_text(config_, 2, 40).tokens;
  const at::Tensor all = m.logits(tokens), positions = at::tensor({39, 0, 17, 17}, at::kLong);
  EXPECT_LE(
      (m.logits_at(tokens, positions) - all.index_select(1, positions)).abs().max().item<double>(),
      1e-5);
  expect_error(ErrorKind::kUsage, {"40", "[0, 40)"},
               [&] { m.logits_at(tokens, at::tensor({3, 40}, at::kLong)); });
  expect_error(ErrorKind::kUsage, {"[0, 40)"},
               [&] { m.logits_at(tokens, at::empty({0}, at::kLong)); });
}

TEST_F(ExamplesTest, UnderBf16TheHeadOfChosenPositionsIsInFp32) {
  CausalLM m(config_, tp_, make_exact_attention(), {.dtype = at::kBFloat16});
  set_weights(m, random_weights(config_, 1), tp_);
  const at::Tensor tokens = random_text(config_, 1, 40).tokens;
  const at::Tensor all = m.logits(tokens), chosen = m.logits_at(tokens, at::arange(40));
  const auto rounded = [](const at::Tensor& x) { return x.to(at::kBFloat16).to(at::kFloat); };
  EXPECT_TRUE(all.equal(rounded(all)));
  EXPECT_FALSE(chosen.equal(rounded(chosen)));
  EXPECT_LE((chosen - all).abs().max().item<double>(), 0.01 * all.abs().max().item<double>());
}

TEST_F(ExamplesTest, TargetsOfOneTokenShareAPass) {
  const auto controller = std::make_shared<LowRankController>(make_fixed_policy(6, 16),
                                                              Geometry{8, 2});
  CausalLM m = model(controller);
  const at::Tensor context = random_text(config_, 1, 40).tokens[0];
  const auto token = [](int64_t id) { return at::full({1}, id, at::kLong); };
  const auto passes = [&](std::vector<at::Tensor> targets) {
    controller->take_statistics();
    const QuestionScore scored = score(m, asking("0", context, targets)).at(0);
    const int64_t calls = controller->take_statistics().calls;
    for (size_t i = 0; i < targets.size(); ++i) {
      EXPECT_NEAR(scored.logprobs[i],
                  score(m, asking("1", context, {targets[i]})).at(0).logprobs[0], 1e-5);
    }
    return calls / config_.num_hidden_layers;
  };
  EXPECT_EQ(passes({token(1), token(2), token(3)}), 1);
  EXPECT_EQ(passes({at::tensor({1, 2}, at::kLong), at::tensor({1, 3}, at::kLong),
                    at::tensor({2, 3}, at::kLong)}),
            2);
  EXPECT_EQ(passes({token(1), at::tensor({1, 2}, at::kLong)}), 2);
}

TEST_F(ExamplesTest, QuestionsAboutOneTextShareAPass) {
  const auto controller = std::make_shared<LowRankController>(make_fixed_policy(6, 16),
                                                              Geometry{8, 2});
  CausalLM m = model(controller);
  const at::Tensor context = random_text(config_, 1, 60).tokens[0];
  const auto token = [](int64_t id) { return at::full({1}, id, at::kLong); };
  const at::Tensor goes_on = context.narrow(0, 30, 3).clone(), ends_otherwise = goes_on.clone(),
                   another = goes_on.clone();
  ends_otherwise[2] = (goes_on[2].item<int64_t>() + 1) % config_.vocab_size;
  another[0] = (goes_on[0].item<int64_t>() + 1) % config_.vocab_size;
  Example example{.id = "0",
                  .context = context,
                  .questions = {{.at = 50, .targets = {token(3), token(4)}, .answer = 1},
                                {.at = 30, .targets = {goes_on, ends_otherwise}},
                                {.at = 1, .targets = {token(5)}},
                                {.at = 60, .targets = {token(6), token(7)}}}};
  const auto passes = [&] {
    controller->take_statistics();
    const auto scores = score(m, example);
    const at::Tensor logprobs = m.logits(context.unsqueeze(0))[0].log_softmax(1);
    EXPECT_EQ(scores.size(), example.questions.size());
    for (size_t q = 0; q < scores.size(); ++q) {
      const Question& question = example.questions[q];
      for (size_t i = 0; i < question.targets.size(); ++i) {
        const at::Tensor target = question.targets[i];
        if (!target.equal(another)) {
          EXPECT_NEAR(scores[q].logprobs.at(i),
                      logprobs.narrow(0, question.at - 1, target.numel())
                          .gather(1, target.unsqueeze(1))
                          .sum()
                          .item<double>(),
                      1e-4)
              << q;
        }
      }
      if (question.targets.size() > 1) {
        const auto best = std::max_element(scores[q].logprobs.begin(), scores[q].logprobs.end()) -
                          scores[q].logprobs.begin();
        EXPECT_EQ(scores[q].right, best == question.answer) << q;
      }
    }
    return scores;
  };
  passes();
  EXPECT_EQ(controller->take_statistics().calls / config_.num_hidden_layers, 2)
      << "one of score, one of the logits it is compared with";
  example.questions[1].targets.push_back(another);
  const double own = passes()[1].logprobs.at(2);
  EXPECT_EQ(controller->take_statistics().calls / config_.num_hidden_layers, 3);
  EXPECT_EQ(own, score(m, asking("1", context.narrow(0, 0, 30), {another})).at(0).logprobs.at(0))
      << "a text of its own, no longer than need be";
}

TEST_F(ExamplesTest, WhatTheModelRefusesNamesTheExample) {
  CausalLM m = model(make_exact_attention());
  expect_error(ErrorKind::kData,
               {"example 'seven'", "4 tokens", std::to_string(config_.vocab_size)}, [&] {
                 score(m, asking("seven", at::full({4}, config_.vocab_size, at::kLong),
                                 {at::zeros({1}, at::kLong)}));
               });
}

TEST_F(ExamplesTest, FilesAreRead) {
  const TemporaryDirectory folder;
  write_bytes(folder / "a.jsonl",
              "{\"id\": \"a\", \"context\": [1, 2, 3], \"targets\": [[4], [5, 6]], \"answer\": 1, "
              "\"depth\": 0.5}\n\n"
              "{\"answer\": 0, \"targets\": [[0]], \"context\": [7], \"id\": \"b\"}\n"
              "{\"id\": \"c\", \"context\": [1, 2], \"questions\": [{\"at\": 2, \"targets\": "
              "[[3]], \"answer\": 0}, {\"at\": 1, \"targets\": [[4], "
              "[2, 5]], \"answer\": 1, \"word\": \"x\"}]}");
  const std::vector<Example> examples = read_examples(folder / "a.jsonl", config_);
  ASSERT_EQ(examples.size(), 3U);
  EXPECT_EQ(examples[0].id, "a");
  EXPECT_TRUE(examples[0].context.equal(at::tensor({1, 2, 3}, at::kLong)));
  ASSERT_EQ(examples[0].questions.size(), 1U);
  EXPECT_EQ(examples[0].questions[0].at, 3);
  ASSERT_EQ(examples[0].questions[0].targets.size(), 2U);
  EXPECT_TRUE(examples[0].questions[0].targets[1].equal(at::tensor({5, 6}, at::kLong)));
  EXPECT_EQ(examples[0].questions[0].answer, 1);
  EXPECT_EQ(examples[1].id, "b");
  EXPECT_EQ(examples[1].questions.at(0).at, 1);
  ASSERT_EQ(examples[2].questions.size(), 2U);
  EXPECT_EQ(examples[2].questions[0].at, 2);
  EXPECT_EQ(examples[2].questions[1].at, 1);
  EXPECT_TRUE(examples[2].questions[1].targets.at(1).equal(at::tensor({2, 5}, at::kLong)));
  EXPECT_EQ(examples[2].questions[1].answer, 1);
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
  refuses(R"({"id": )" + std::string(200'000, '['), {"nests deeper"});
  refuses(R"({"id": "b", "context": [1], "targets": [[2]]})", {"no 'answer'"});
  refuses(R"({"id": 3, "context": [1], "targets": [[2]], "answer": 0})", {"'id'", "3", "string"});
  refuses(R"({"id": "b", "context": [], "targets": [[2]], "answer": 0})", {"'context'", "empty"});
  refuses(R"({"id": "b", "context": [1, )" + vocabulary + R"(], "targets": [[2]], "answer": 0})",
          {"'context'", vocabulary, "[0, " + vocabulary + ")"});
  refuses(R"({"id": "b", "context": [-1], "targets": [[2]], "answer": 0})", {"'context'", "-1"});
  refuses(R"({"id": "b", "context": [18446744073709551615], "targets": [[2]], "answer": 0})",
          {"18446744073709551615"});
  refuses(R"({"id": "b", "context": [1.5], "targets": [[2]], "answer": 0})",
          {"1.5", "whole number"});
  refuses(R"({"id": "b", "context": [1], "targets": [], "answer": 0})", {"'targets'"});
  refuses(R"({"id": "b", "context": [1], "targets": [[2], []], "answer": 0})",
          {"target 1", "empty"});
  refuses(R"({"id": "b", "context": [1], "targets": [[2], [3]], "answer": 2})",
          {"'answer'", "2", "[0, 2)"});
  refuses(R"({"id": "b", "context": [1], "questions": []})", {"'questions'"});
  refuses(
      R"({"id": "b", "context": [1], "questions": [{"at": 1, "targets": [[2]], "answer": 0}, 3]})",
      {"question 1", "not a JSON object"});
  refuses(R"({"id": "b", "context": [1], "questions": [{"targets": [[2]], "answer": 0}]})",
          {"question 0", "no 'at'"});
  refuses(R"({"id": "b", "context": [1], "questions": [{"at": 0, "targets": [[2]], "answer": 0}]})",
          {"question 0", "'at' is 0"});
  refuses(R"({"id": "b", "context": [1], "questions": [{"at": 2, "targets": [[2]], "answer": 0}]})",
          {"question 0: 'at'", "2", "[0, 2)"});
  refuses(R"({"id": "b", "context": [1], "questions": [{"at": 1, "targets": [[]], "answer": 0}]})",
          {"question 0: target 0", "empty"});
  refuses(R"({"id": "b", "context": [1], "questions": [{"at": 1, "targets": [[2]], "answer": 1}]})",
          {"question 0: 'answer'", "1", "[0, 1)"});
  refuses(good, {"id 'a'", "line 1"});
  std::string many = "1";
  for (int64_t i = 1; i < config_.max_position_embeddings; ++i) {
    many += ",1";
  }
  refuses(R"({"id": "b", "context": [)" + many + R"(], "targets": [[2, 3]], "answer": 0})",
          {"128", "max_position_embeddings"});
  refuses(R"({"id": "b", "context": [1,)" + many +
              R"(], "questions": [{"at": 1, "targets": [[2]], "answer": 0}]})",
          {"129", "max_position_embeddings"});
  write_bytes(folder / "fits.jsonl",
              R"({"id": "b", "context": [)" + many + R"(], "targets": [[2]], "answer": 0})");
  EXPECT_EQ(read_examples(folder / "fits.jsonl", config_).size(), 1U)
      << "the last token of a target takes no position";
  write_bytes(folder / "none.jsonl", "\n");
  expect_error(ErrorKind::kData, {"none.jsonl", "no examples"},
               [&] { read_examples(folder / "none.jsonl", config_); });
  expect_error(ErrorKind::kData, {"nowhere"},
               [&] { read_examples(folder / "nowhere.jsonl", config_); });
  ASSERT_EQ(::mkfifo((folder / "pipe.jsonl").c_str(), 0600), 0);
  expect_error(ErrorKind::kData, {"pipe.jsonl", "regular file"},
               [&] { read_examples(folder / "pipe.jsonl", config_); });
}

}  // namespace
}  // namespace drrl::test
