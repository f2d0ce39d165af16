#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

#include <ATen/ATen.h>

#include "core/io/file_io.h"

namespace drrl {

/// Megatron-LM's indexed token data set: PREFIX.bin holds the tokens of all sequences one after the
/// other, PREFIX.idx says where each sequence and document starts. Little endian:
///   "MMIDIDX\0\0", u64 version 1, u8 dtype code, u64 sequences S, u64 D, i32 sizes[S] (tokens),
///   i64 pointers[S] (bytes), i64 documents[D]
/// where documents[] are sequence indices from 0 to S and D is one more than the number of
/// documents. Source: megatron/core/datasets/indexed_dataset.py. Opening checks every field of the
/// .idx against the .bin. Errors: Error(kData) that names the file, the value and what was
/// expected.
class TokenFile {
 public:
  /// `prefix` without extension; a path that ends in .bin or .idx is taken as its prefix.
  static TokenFile open(const std::filesystem::path& prefix);

  const std::filesystem::path& bin_path() const noexcept { return bin_.path(); }
  int64_t tokens() const noexcept { return tokens_; }  ///< length of the concatenated stream
  int64_t sequences() const noexcept { return sequences_; }
  int64_t documents() const noexcept { return documents_; }
  at::ScalarType dtype() const noexcept { return dtype_; }  ///< as stored

  /// Tokens [start, start + length) of the concatenated stream, int64 [length] on the CPU. Thread
  /// safe.
  at::Tensor read(int64_t start, int64_t length) const;

  struct OutOfVocabulary {
    int64_t position;  ///< in the concatenated stream
    int64_t token;
  };

  /// The first token that is negative or >= vocab_size; reads the whole stream.
  std::optional<OutOfVocabulary> find_out_of_vocabulary(int64_t vocab_size) const;

  /// Throws Error(kData) naming file, position and token if there is such a token.
  void check_vocabulary(int64_t vocab_size) const;

 private:
  explicit TokenFile(FileReader bin) : bin_(std::move(bin)) {}

  FileReader bin_;
  at::ScalarType dtype_ = at::kInt;
  int64_t item_size_ = 4;
  int64_t tokens_ = 0;
  int64_t sequences_ = 0;
  int64_t documents_ = 0;
};

/// PREFIX.bin or PREFIX.idx, as `extension` says, of a prefix that may end in either.
std::filesystem::path token_path(const std::filesystem::path& prefix, const char* extension);

/// Writes PREFIX.bin and PREFIX.idx, one sequence per document. `dtype`: kByte, kChar, kShort,
/// kUInt16, kInt or kLong; Error(kData) if a token does not fit.
void write_token_file(const std::filesystem::path& prefix,
                      const std::vector<std::vector<int64_t>>& documents,
                      at::ScalarType dtype = at::kUInt16);

}  // namespace drrl
