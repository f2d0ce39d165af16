#include "models/data/examples.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <utility>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/io/file_io.h"

namespace drrl {
namespace {

using nlohmann::json;

/// `where` ("file:line: 'key'") starts every message.
int64_t read_index(const json& value, int64_t end, const std::string& where, const char* what) {
  check(ErrorKind::kData, value.is_number_integer(), where, " holds ", value.dump(), ", expected ",
        what, ", a whole number");
  const int64_t number = value.is_number_unsigned() && value.get<uint64_t>() >= uint64_t{1} << 63
                             ? end
                             : value.get<int64_t>();
  check(ErrorKind::kData, number >= 0 && number < end, where, " holds ", value.dump(),
        ", expected ", what, " in [0, ", end, ")");
  return number;
}

at::Tensor read_tokens(const json& value, const ModelConfig& config, const std::string& where) {
  check(ErrorKind::kData, value.is_array() && !value.empty(), where, " is ",
        value.is_array() ? "empty" : value.type_name(), ", expected a list of token ids");
  std::vector<int64_t> ids;
  ids.reserve(value.size());
  for (const json& id : value) {
    ids.push_back(read_index(id, config.vocab_size, where, "a token id of the model"));
  }
  return at::tensor(ids, at::kLong);
}

void check_keys(const json& object, std::initializer_list<const char*> keys,
                const std::string& where) {
  check(ErrorKind::kData, object.is_object(), where, ": not a JSON object");
  for (const char* key : keys) {
    check(ErrorKind::kData, object.contains(key), where, ": no '", key, "'");
  }
}

/// "targets" and "answer" of `object`, a question about what follows the first `at` tokens of a
/// text.
Question read_question(const json& object, int64_t at, const ModelConfig& config,
                       const std::string& where) {
  Question question{.at = at};
  const json& targets = object["targets"];
  check(ErrorKind::kData, targets.is_array() && !targets.empty(), where,
        ": 'targets' must be a list of one or more lists of token ids");
  for (size_t i = 0; i < targets.size(); ++i) {
    const at::Tensor target = read_tokens(targets[i], config, c10::str(where, ": target ", i));
    // The last token of a target is predicted only, never read.
    check(ErrorKind::kData, at + target.numel() - 1 <= config.max_position_embeddings, where,
          ": a context of ", at, " and a target of ", target.numel(),
          " tokens are longer than the model's max_position_embeddings, ",
          config.max_position_embeddings);
    question.targets.push_back(target);
  }
  question.answer = read_index(object["answer"], static_cast<int64_t>(targets.size()),
                               where + ": 'answer'", "the index of a target");
  return question;
}

Example read_example(const std::string& line, const ModelConfig& config, const std::string& where) {
  check_nesting(line, where, ErrorKind::kData);
  const json object = json::parse(line, nullptr, /*allow_exceptions=*/false);
  check_keys(object, {"id", "context"}, where);
  check(ErrorKind::kData, object["id"].is_string(), where, ": 'id' is ", object["id"].dump(),
        ", expected a string");
  Example example{.id = object["id"],
                  .context = read_tokens(object["context"], config, where + ": 'context'"),
                  .questions = {}};
  const int64_t length = example.context.numel();
  if (!object.contains("questions")) {
    check_keys(object, {"targets", "answer"}, where);
    example.questions.push_back(read_question(object, length, config, where));
    return example;
  }
  check(ErrorKind::kData, length <= config.max_position_embeddings, where, ": a context of ",
        length, " tokens is longer than the model's max_position_embeddings, ",
        config.max_position_embeddings);
  const json& questions = object["questions"];
  check(ErrorKind::kData, questions.is_array() && !questions.empty(), where,
        ": 'questions' must be a list of one or more objects");
  for (size_t i = 0; i < questions.size(); ++i) {
    const std::string place = c10::str(where, ": question ", i);
    check_keys(questions[i], {"at", "targets", "answer"}, place);
    const int64_t at = read_index(questions[i]["at"], length + 1, place + ": 'at'",
                                  "tokens of the context before the question");
    check(ErrorKind::kData, at >= 1, place,
          ": 'at' is 0, expected at least one token before the question");
    example.questions.push_back(read_question(questions[i], at, config, place));
  }
  return example;
}

}  // namespace

std::vector<Example> read_examples(const std::filesystem::path& path, const ModelConfig& config) {
  const FileReader regular(path,
                           ErrorKind::kData);  // refuses pipes and devices, which may never end
  std::ifstream file(path);
  check(ErrorKind::kData, file.good(), path.string(),
        ": cannot be read, expected a file of examples, a JSON object a line");
  std::vector<Example> examples;
  std::map<std::string, int64_t> line_of;
  int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    const std::string where = c10::str(path.string(), ":", ++number);
    if (line.find_first_not_of(" \t\r") == std::string::npos) {
      continue;
    }
    examples.push_back(read_example(line, config, where));
    const auto [found, is_new] = line_of.emplace(examples.back().id, number);
    check(ErrorKind::kData, is_new, where, ": id '", examples.back().id, "' is that of line ",
          found->second, " too, expected all different");
  }
  check(ErrorKind::kData, !file.bad(), path.string(), ": reading failed after line ", number);
  check(ErrorKind::kData, !examples.empty(), path.string(), ": no examples");
  return examples;
}

namespace {

/// A text to read, and the positions [T_i] of it whose logits say the tokens of each target.
struct Pass {
  at::Tensor text;
  std::vector<at::Tensor> positions = {};
  int64_t rows = 0;  ///< sum of T_i
};

/// Where the logits of a target are.
struct Place {
  size_t pass;
  int64_t row;
};

/// Errors: see score.
at::Tensor read(CausalLM& model, const Pass& pass, const std::string& id) {
  try {
    return model.logits_at(pass.text.unsqueeze(0), at::cat(pass.positions))[0].to(at::kCPU,
                                                                                  at::kDouble);
  } catch (const Error& error) {  // a budget, for one, cannot be met at every length
    raise(error.kind(), "example '", id, "', ", pass.text.numel(), " tokens: ", error.what());
  }
}

}  // namespace

std::vector<QuestionScore> score(CausalLM& model, const Example& example) {
  check(ErrorKind::kUsage, model.context().size() == 1,
        "examples cannot be scored on sequences that are split over ", model.context().size(),
        " processes");
  std::vector<Pass> passes;
  std::vector<Place> places;  // of all targets of all questions in turn
  for (const Question& question : example.questions) {
    for (const at::Tensor& target : question.targets) {
      const at::Tensor start = target.narrow(0, 0, target.numel() - 1);
      const bool goes_on = question.at + start.numel() <= example.context.numel() &&
                           example.context.narrow(0, question.at, start.numel()).equal(start);
      const at::Tensor text = goes_on ? example.context
                                      : at::cat({example.context.narrow(0, 0, question.at), start});
      auto pass = std::find_if(passes.begin(), passes.end(),
                               [&](const Pass& other) { return other.text.equal(text); });
      pass = pass == passes.end() ? passes.insert(pass, {.text = text}) : pass;
      places.push_back({static_cast<size_t>(pass - passes.begin()), pass->rows});
      pass->positions.push_back(at::arange(question.at - 1, question.at - 1 + target.numel()));
      pass->rows += target.numel();
    }
  }
  std::vector<at::Tensor> logits;
  for (const Pass& pass : passes) {
    logits.push_back(read(model, pass, example.id));
  }

  std::vector<QuestionScore> scores;
  auto place = places.begin();
  for (const Question& question : example.questions) {
    QuestionScore& result = scores.emplace_back();
    bool most_likely = false;
    for (const at::Tensor& target : question.targets) {
      const at::Tensor own = logits[place->pass].narrow(0, place->row, target.numel());
      ++place;
      const at::Tensor said = own.gather(1, target.unsqueeze(1));
      result.logprobs.push_back((said - own.logsumexp(1, /*keepdim=*/true)).sum().item<double>());
      check(ErrorKind::kNumerics, std::isfinite(result.logprobs.back()), "example '", example.id,
            "': the log-probability of a target is ", result.logprobs.back());
      most_likely = at::ge(own, said).sum(1).eq(1).all().item<bool>();  // no token but the target's
                                                                        // own
    }
    if (question.targets.size() == 1) {
      result.right = most_likely;
    } else {
      const double answer = result.logprobs[static_cast<size_t>(question.answer)];
      result.right = std::count_if(result.logprobs.begin(), result.logprobs.end(),
                                   [&](double other) { return other >= answer; }) == 1;
    }
  }
  return scores;
}

}  // namespace drrl
