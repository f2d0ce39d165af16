#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace drrl {

/// The words that a tokenizer.json gives to token ids, without those added to them.
struct Vocabulary {
  int64_t size = 0;
  std::string sha1;  ///< of "ID<tab>WORD<newline>" for all of them, by id and word;
                     ///< launch/prepare/prepare.py writes the same beside token files
};

/// nullopt where the file lists no vocabulary. Errors: Error(kModel) that names the file.
std::optional<Vocabulary> read_vocabulary(const std::filesystem::path& tokenizer_json);

/// Compares what DATA.json (of a token file PREFIX.json) says about the tokenizer that made the
/// tokens with the one in the model's folder; without a word where one of them is not there or says
/// nothing. A tokenizer.json that was saved anew, or that has more added tokens, is the same.
/// Errors: Error(kData) that names both.
void check_tokenizer(const std::filesystem::path& data, const std::filesystem::path& model_folder);

}  // namespace drrl
