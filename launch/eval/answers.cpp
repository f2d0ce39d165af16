#include "launch/eval/answers.h"

#include <cmath>
#include <cstdint>
#include <iostream>

#include "launch/eval/totals.h"
#include "launch/runtime/process.h"

namespace drrl {

nlohmann::ordered_json answers(CausalLM& model, LowRankController& controller,
                               const std::vector<Example>& examples, const Mesh& mesh,
                               std::vector<nlohmann::ordered_json>& lines) {
  const size_t count = examples.size();
  std::vector<double> attention_ms(count), flops(count), right,
      logprobs;  // right: of all questions in turn; logprobs: of all of their targets
  Totals totals;
  const auto watched = watch(watchdog(), "answers");
  for (size_t i = 0; i < count; ++i) {
    sign_of_life();
    const Example& example = examples[i];
    const bool mine = static_cast<int64_t>(i) % mesh.dp().size() == mesh.dp().rank();
    std::vector<QuestionScore> scores;
    if (mine) {
      controller.take_statistics();
      scores = score(model, example);
      const AttentionStatistics spent = controller.take_statistics();
      totals.attention += spent;
      attention_ms[i] = spent.attention_ms;
      flops[i] = spent.flops / spent.exact_flops;
    }
    for (size_t q = 0; q < example.questions.size(); ++q) {
      const std::vector<double> none(example.questions[q].targets.size());
      const std::vector<double>& own = mine ? scores[q].logprobs : none;
      logprobs.insert(logprobs.end(), own.begin(), own.end());
      right.push_back(mine && scores[q].right ? 1 : 0);
    }
  }
  const AttentionStatistics all = reduce(totals, mesh).attention;
  right = merge(right, mesh);
  attention_ms = merge(attention_ms, mesh);
  flops = merge(flops, mesh);
  logprobs = merge(logprobs, mesh);

  double hits = 0, nll = 0;
  auto logprob = logprobs.begin();
  for (size_t i = 0; i < count; ++i) {
    const Example& example = examples[i];
    for (const Question& question : example.questions) {
      const std::vector<double> own(logprob,
                                    logprob + static_cast<std::ptrdiff_t>(question.targets.size()));
      logprob += static_cast<std::ptrdiff_t>(own.size());
      const double answer_nll = -own[static_cast<size_t>(question.answer)];
      const bool hit = right[lines.size()] > 0;
      hits += hit ? 1 : 0;
      nll += answer_nll;
      lines.push_back(
          {{"id", example.id},
           {"at", question.at},
           {"right", hit},
           {"nll", answer_nll},
           {"logprobs", own},
           {"context_tokens", example.context.numel()},
           {"attention_flops_fraction", flops[i]},
           {"attention_ms", attention_ms[i] / static_cast<double>(example.questions.size())}});
    }
  }
  const auto questions = static_cast<double>(lines.size());
  nlohmann::ordered_json json = {{"accuracy", hits / questions},
                                 {"examples", count},
                                 {"questions", lines.size()},
                                 {"right", std::llround(hits)},
                                 {"nll", nll / questions}};
  json.update(attention_json(all, model.config().head_dim));
  return json;
}

void print_answers(const nlohmann::ordered_json& json) {
  std::cout << "accuracy " << json["accuracy"].get<double>() << " (" << json["right"] << " of "
            << json["questions"] << " right), nll of the answer " << json["nll"].get<double>()
            << ", attention FLOPs " << json["attention_flops_fraction"].get<double>()
            << " of exact, mean ranks " << json["mean_rank_qk"].get<double>() << " / "
            << json["mean_rank_v"].get<double>() << ", attention "
            << json["attention_ms"].get<double>() << " ms\n";
  print_exact_pairs(json);
}

}  // namespace drrl
