#include "models/causal_lm/tokenizer.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <c10/util/hash.h>
#include <nlohmann/json.hpp>

#include "core/io/file_io.h"

namespace drrl {
namespace {

using Json = nlohmann::json;
constexpr uint64_t kLargestTokenizer = uint64_t{1} << 30;
constexpr uint64_t kLargestNote = uint64_t{1} << 20;

}  // namespace

std::optional<Vocabulary> read_vocabulary(const std::filesystem::path& tokenizer_json) {
  constexpr ErrorKind kind = ErrorKind::kModel;
  const std::string text = read_text(tokenizer_json, kind, kLargestTokenizer);
  check_nesting(text, tokenizer_json.string(), kind);
  const Json json = Json::parse(text, nullptr, false);
  check(kind, !json.is_discarded(), tokenizer_json, " is not valid JSON");
  const Json::json_pointer place("/model/vocab");
  if (!json.contains(place)) {
    return std::nullopt;
  }
  const Json& words = json.at(place);
  std::vector<std::pair<int64_t, std::string>> entries;
  if (words.is_object()) {
    for (const auto& [word, id] : words.items()) {
      check(kind, id.is_number_integer(), tokenizer_json, ": the id of ", quoted(word),
            " in the vocabulary is not an integer");
      entries.emplace_back(id.get<int64_t>(), word);
    }
  } else if (words.is_array()) {  // [word, score], by id
    for (const Json& word : words) {
      check(kind, word.is_array() && !word.empty() && word[0].is_string(), tokenizer_json,
            ": entry ", entries.size(), " of the vocabulary is not a word and its score");
      entries.emplace_back(static_cast<int64_t>(entries.size()), word[0].get<std::string>());
    }
  } else {
    return std::nullopt;
  }
  std::sort(entries.begin(), entries.end());
  std::string listed;
  for (const auto& [id, word] : entries) {
    listed += std::to_string(id) + "\t" + word + "\n";
  }
  return Vocabulary{static_cast<int64_t>(entries.size()), c10::sha1(listed).str()};
}

void check_tokenizer(const std::filesystem::path& data, const std::filesystem::path& model_folder) {
  constexpr ErrorKind kind = ErrorKind::kData;
  std::filesystem::path note = data;
  if (note.extension() == ".bin" || note.extension() == ".idx") {
    note.replace_extension();
  }
  note += ".json";
  const std::filesystem::path tokenizer = model_folder / "tokenizer.json";
  if (!path_exists(note, kind) || !path_exists(tokenizer, ErrorKind::kModel) ||
      is_folder(note, kind) || FileReader(note, kind).size() > kLargestNote) {
    return;
  }
  const std::string text = read_text(note, kind);
  check_nesting(text, note.string(), kind);
  const Json json = Json::parse(text, nullptr, false);
  const auto found = json.is_object() ? json.find("vocabulary") : json.end();
  if (!json.is_object() || found == json.end() || !found->is_object() || !found->contains("sha1") ||
      !(*found)["sha1"].is_string()) {
    return;  // not a note of prepare.py, or an older one
  }
  const std::optional<Vocabulary> own = read_vocabulary(tokenizer);
  const auto described = [&](const char* field) {
    const Json& value = found->contains(field) ? (*found)[field] : Json("?");
    return value.is_string()
               ? quoted(value.get<std::string>())
               : value.dump(-1, ' ', true, Json::error_handler_t::replace).substr(0, 40);
  };
  check(kind, !own || own->sha1 == (*found)["sha1"].get<std::string>(), data,
        " was made with another tokenizer than the model's: ", note, " says ",
        described("tokenizer"), " of ", described("size"), " words, ", tokenizer, " has ",
        own ? own->size : 0,
        " and gives the ids to other words. Make the tokens with launch/prepare/prepare.py text "
        "--model ",
        model_folder.string(), ", or remove ", note, " if the ids are right all the same");
}

}  // namespace drrl
