#include "models/examples.h"

#include "core/error.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <utility>

namespace drrl {
namespace {

using nlohmann::json;

/// `where` ("file:line: 'key'") starts every message.
int64_t read_index(const json& value, int64_t end, const std::string& where, const char* what) {
  check(ErrorKind::kData, value.is_number_integer(), where, " holds ", value.dump(), ", expected ", what, ", a whole number");
  const int64_t number = value.is_number_unsigned() && value.get<uint64_t>() >= uint64_t{1} << 63 ? end : value.get<int64_t>();
  check(ErrorKind::kData, number >= 0 && number < end, where, " holds ", value.dump(), ", expected ", what, " in [0, ", end, ")");
  return number;
}

at::Tensor read_tokens(const json& value, const ModelConfig& config, const std::string& where) {
  check(ErrorKind::kData, value.is_array() && !value.empty(), where, " is ", value.is_array() ? "empty" : value.type_name(), ", expected a list of token ids");
  std::vector<int64_t> ids;
  ids.reserve(value.size());
  for (const json& id : value) {
    ids.push_back(read_index(id, config.vocab_size, where, "a token id of the model"));
  }
  return at::tensor(ids, at::kLong);
}

Example read_example(const std::string& line, const ModelConfig& config, const std::string& where) {
  const json object = json::parse(line, nullptr, /*allow_exceptions=*/false);
  check(ErrorKind::kData, object.is_object(), where, ": not a JSON object");
  for (const char* key : {"id", "context", "targets", "answer"}) {
    check(ErrorKind::kData, object.contains(key), where, ": no '", key, "'");
  }
  check(ErrorKind::kData, object["id"].is_string(), where, ": 'id' is ", object["id"].dump(), ", expected a string");
  Example example;
  example.id = object["id"];
  example.context = read_tokens(object["context"], config, where + ": 'context'");
  const json& targets = object["targets"];
  check(ErrorKind::kData, targets.is_array() && !targets.empty(), where, ": 'targets' must be a list of one or more lists of token ids");
  for (size_t i = 0; i < targets.size(); ++i) {
    const at::Tensor target = read_tokens(targets[i], config, c10::str(where, ": target ", i));
    // The last token of a target is predicted only, never read.
    const int64_t length = example.context.numel() + target.numel() - 1;
    check(ErrorKind::kData, length <= config.max_position_embeddings, where, ": a context of ", example.context.numel(), " and a target of ", target.numel(),
          " tokens are longer than the model's max_position_embeddings, ", config.max_position_embeddings);
    example.targets.push_back(target);
  }
  example.answer = read_index(object["answer"], static_cast<int64_t>(targets.size()), where + ": 'answer'", "the index of a target");
  return example;
}

}  // namespace

std::vector<Example> read_examples(const std::filesystem::path& path, const ModelConfig& config) {
  std::ifstream file(path);
  check(ErrorKind::kData, file.good(), path.string(), ": cannot be read, expected a file of examples, a JSON object a line");
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
    check(ErrorKind::kData, is_new, where, ": id '", examples.back().id, "' is that of line ", found->second, " too, expected all different");
  }
  check(ErrorKind::kData, !file.bad(), path.string(), ": reading failed after line ", number);
  check(ErrorKind::kData, !examples.empty(), path.string(), ": no examples");
  return examples;
}

ExampleScore score(CausalLM& model, const Example& example) {
  check(ErrorKind::kUsage, model.context().size() == 1, "examples cannot be scored on sequences that are split over ", model.context().size(), " processes");
  ExampleScore result;
  bool most_likely = false;
  at::Tensor tokens, logits;
  for (const at::Tensor& target : example.targets) {
    const at::Tensor read = at::cat({example.context, target.narrow(0, 0, target.numel() - 1)}).unsqueeze(0);
    if (!tokens.defined() || !at::equal(read, tokens)) {  // labels of one token each are scored in one pass
      tokens = read;
      try {
        logits = model.logits(tokens, target.numel())[0].to(at::kCPU, at::kDouble);
      } catch (const Error& error) {  // a budget, for one, cannot be met at every length
        raise(error.kind(), "example '", example.id, "', ", tokens.numel(), " tokens: ", error.what());
      }
    }
    const at::Tensor said = logits.gather(1, target.unsqueeze(1));
    result.logprobs.push_back((said - logits.logsumexp(1, /*keepdim=*/true)).sum().item<double>());
    check(ErrorKind::kNumerics, std::isfinite(result.logprobs.back()), "example '", example.id, "': the log-probability of a target is ", result.logprobs.back());
    most_likely = at::ge(logits, said).sum(1).eq(1).all().item<bool>();  // no token but the target's own
  }
  if (example.targets.size() == 1) {
    result.right = most_likely;
  } else {
    const double answer = result.logprobs[static_cast<size_t>(example.answer)];
    result.right = std::count_if(result.logprobs.begin(), result.logprobs.end(), [&](double other) { return other >= answer; }) == 1;
  }
  return result;
}

}  // namespace drrl
