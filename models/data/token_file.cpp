#include "models/data/token_file.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>

namespace drrl {
namespace {

constexpr ErrorKind kKind = ErrorKind::kData;
constexpr std::string_view kMagic("MMIDIDX\0\0", 9);
constexpr uint64_t kVersion = 1;
constexpr uint64_t kHeaderBytes = 9 + 8 + 1 + 8 + 8;
constexpr int64_t kChunk = int64_t{1} << 20;  // elements read at a time

struct DtypeCode {
  uint8_t code;
  at::ScalarType dtype;
  int64_t bytes;
};

// Codes 6 and 7 are float64 and float32, which hold no token ids.
constexpr std::array kCodes = {
    DtypeCode{1, at::kByte, 1}, DtypeCode{2, at::kChar, 1}, DtypeCode{3, at::kShort, 2},
    DtypeCode{4, at::kInt, 4},  DtypeCode{5, at::kLong, 8}, DtypeCode{8, at::kUInt16, 2},
};

template <typename T>
T read_field(const FileReader& file, uint64_t offset) {
  T value{};
  file.read(offset, &value, sizeof(T));
  return value;
}

// Calls visit(index, value) for `count` values of type T from `offset`, through a buffer of bounded
// size.
template <typename T, typename Visit>
void for_each_value(const FileReader& file, uint64_t offset, int64_t count, const Visit& visit) {
  std::vector<T> buffer(static_cast<size_t>(std::min(count, kChunk)));
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t length = std::min(count - start, kChunk);
    file.read(offset + static_cast<uint64_t>(start) * sizeof(T), buffer.data(),
              static_cast<uint64_t>(length) * sizeof(T));
    for (int64_t i = 0; i < length; ++i) {
      visit(start + i, buffer[static_cast<size_t>(i)]);
    }
  }
}

// Widens `count` stored tokens to int64 in place of a switch at every use.
template <typename Visit>
void with_stored_type(at::ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case at::kByte: return visit(uint8_t{});
    case at::kChar: return visit(int8_t{});
    case at::kShort: return visit(int16_t{});
    case at::kUInt16: return visit(uint16_t{});
    case at::kInt: return visit(int32_t{});
    case at::kLong: return visit(int64_t{});
    default: raise(ErrorKind::kInternal, "token files of ", c10::toString(dtype), " do not exist");
  }
}

}  // namespace

std::filesystem::path token_path(const std::filesystem::path& prefix, const char* extension) {
  std::string text = prefix.string();
  for (const std::string_view suffix : {".bin", ".idx"}) {
    if (text.ends_with(suffix)) {
      text.resize(text.size() - suffix.size());
      break;
    }
  }
  return text + extension;
}

TokenFile TokenFile::open(const std::filesystem::path& prefix) {
  const bool no_index = path_exists(prefix, kKind) &&
                        !path_exists(token_path(prefix, ".idx"), kKind);
  check(kKind, !no_index || is_folder(prefix, kKind), token_path(prefix, ".idx"),
        ": No such file; ", prefix,
        " is not a token file: launch/prepare/prepare.py text makes one of a text");
  const FileReader idx(token_path(prefix, ".idx"), kKind);
  TokenFile result(FileReader(token_path(prefix, ".bin"), kKind));
  const auto& path = idx.path();
  const FileReader& bin = result.bin_;

  check(kKind, idx.size() >= kHeaderBytes, path, " has ", idx.size(),
        " bytes; the header of a Megatron index takes ", kHeaderBytes);
  std::array<char, kMagic.size()> magic{};
  idx.read(0, magic.data(), magic.size());
  check(kKind, std::string_view(magic.data(), magic.size()) == kMagic, path,
        " does not begin with MMIDIDX: it is not a Megatron-LM index");
  const auto version = read_field<uint64_t>(idx, 9);
  check(kKind, version == kVersion, path, " has version ", version, "; version ", kVersion,
        " is supported");
  const auto code = read_field<uint8_t>(idx, 17);
  const auto* dtype = std::find_if(kCodes.begin(), kCodes.end(),
                                   [&](const DtypeCode& entry) { return entry.code == code; });
  check(kKind, dtype != kCodes.end(), path, " has dtype code ", int{code},
        "; token ids are 1 (uint8), 2 (int8), 3 (int16), 4 (int32), 5 (int64) or 8 (uint16)");
  result.dtype_ = dtype->dtype;
  result.item_size_ = dtype->bytes;

  // Each sequence takes 12 bytes and each document 8, which bounds both counts by the size of the
  // file before anything is multiplied.
  const auto sequences = read_field<uint64_t>(idx, 18);
  const auto documents = read_field<uint64_t>(idx, 26);
  const uint64_t room = idx.size() - kHeaderBytes;
  check(kKind, sequences <= room / 12 && documents <= (room - 12 * sequences) / 8, path,
        " announces ", sequences, " sequences and ", documents,
        " document indices, which do not fit into its ", idx.size(), " bytes (truncated?)");
  const uint64_t expected = kHeaderBytes + 12 * sequences + 8 * documents;
  check(kKind, sequences == 0 || idx.size() != expected + sequences, path,
        " has one mode byte per sequence after the document indices: multimodal data sets are not "
        "supported");
  check(kKind, idx.size() == expected, path, " has ", idx.size(), " bytes, but ", sequences,
        " sequences and ", documents, " document indices take ", expected);
  result.sequences_ = static_cast<int64_t>(sequences);

  // The pointers must be the running sums of the sizes: then the .bin is one stream of tokens, and
  // every read of it is inside the file.
  const auto item = static_cast<uint64_t>(dtype->bytes);
  uint64_t total = 0;  // tokens; at most 2^63 / 12 sequences of 2^31 tokens could overflow, so it
                       // is checked against the .bin at each step
  const uint64_t pointers_begin = kHeaderBytes + 4 * sequences;
  std::vector<int64_t> pointers;
  for_each_value<int32_t>(idx, kHeaderBytes, result.sequences_, [&](int64_t i, int32_t size) {
    if (i % kChunk == 0) {
      pointers.resize(static_cast<size_t>(std::min(result.sequences_ - i, kChunk)));
      idx.read(pointers_begin + static_cast<uint64_t>(i) * 8, pointers.data(), pointers.size() * 8);
    }
    const int64_t pointer = pointers[static_cast<size_t>(i % kChunk)];
    check(kKind, size >= 0, path, ": sequence ", i, " has ", size, " tokens");
    check(kKind, pointer >= 0 && static_cast<uint64_t>(pointer) == total * item, path,
          ": sequence ", i, " points to byte ", pointer, " of the .bin; expected ", total * item,
          ", the end of the sequence before it");
    total += static_cast<uint64_t>(size);
    check(kKind, total <= bin.size() / item, path, ": sequence ", i, " ends at token ", total,
          ", but ", bin.path(), " has only ", bin.size(), " bytes, ", bin.size() / item,
          " tokens (truncated?)");
  });
  check(kKind, total * item == bin.size(), bin.path(), " has ", bin.size(), " bytes, but ", path,
        " describes ", total, " tokens of ", item, " bytes, ", total * item, " bytes");
  result.tokens_ = static_cast<int64_t>(total);

  check(kKind, documents >= 1, path, " has no document indices; expected at least the leading 0");
  int64_t previous = 0;
  for_each_value<int64_t>(
      idx, kHeaderBytes + 12 * sequences, static_cast<int64_t>(documents),
      [&](int64_t i, int64_t index) {
        const bool good = i == 0 ? index == 0 : index >= previous && index <= result.sequences_;
        check(kKind, good, path, ": document index ", i, " is ", index, "; expected ",
              i == 0 ? "0" : "a value from ",
              i == 0 ? "" : c10::str(previous, " to ", result.sequences_));
        previous = index;
      });
  check(kKind, previous == result.sequences_, path, ": the last document index is ", previous,
        "; expected the number of sequences, ", result.sequences_);
  result.documents_ = static_cast<int64_t>(documents) - 1;
  return result;
}

at::Tensor TokenFile::read(int64_t start, int64_t length) const {
  check(kKind, start >= 0 && length >= 0 && start <= tokens_ && length <= tokens_ - start,
        bin_.path(), " has ", tokens_, " tokens; ", length, " from token ", start,
        " were asked for");
  at::Tensor stored = at::empty({length}, at::TensorOptions(dtype_));
  bin_.read(static_cast<uint64_t>(start * item_size_), stored.data_ptr(),
            static_cast<uint64_t>(length * item_size_));
  return stored.to(at::kLong);
}

std::optional<TokenFile::OutOfVocabulary> TokenFile::find_out_of_vocabulary(
    int64_t vocab_size) const {
  std::optional<OutOfVocabulary> found;
  with_stored_type(dtype_, [&](auto stored) {
    using Stored = decltype(stored);
    std::vector<Stored> buffer(static_cast<size_t>(std::min(tokens_, kChunk)));
    for (int64_t start = 0; start < tokens_ && !found; start += kChunk) {
      const int64_t length = std::min(tokens_ - start, kChunk);
      bin_.read(static_cast<uint64_t>(start * item_size_), buffer.data(),
                static_cast<uint64_t>(length * item_size_));
      const auto end = buffer.begin() + length;
      const auto bad = std::find_if(buffer.begin(), end, [&](Stored token) {
        return static_cast<int64_t>(token) < 0 || static_cast<int64_t>(token) >= vocab_size;
      });
      if (bad != end) {
        found = OutOfVocabulary{start + (bad - buffer.begin()), static_cast<int64_t>(*bad)};
      }
    }
  });
  return found;
}

void TokenFile::check_vocabulary(int64_t vocab_size) const {
  const auto bad = find_out_of_vocabulary(vocab_size);
  check(kKind, !bad, bin_.path(), ": token ", bad ? bad->position : 0, " is ", bad ? bad->token : 0,
        ", outside of the model's vocabulary (0 to ", vocab_size - 1,
        "); was the text tokenized for another model?");
}

void write_token_file(const std::filesystem::path& prefix,
                      const std::vector<std::vector<int64_t>>& documents, at::ScalarType dtype) {
  const auto* code = std::find_if(kCodes.begin(), kCodes.end(),
                                  [&](const DtypeCode& entry) { return entry.dtype == dtype; });
  check(kKind, code != kCodes.end(), "token files of ", c10::toString(dtype), " do not exist");
  FileWriter bin(token_path(prefix, ".bin"));
  FileWriter idx(token_path(prefix, ".idx"));
  const auto put = [&](FileWriter& file, auto value) { file.write(&value, sizeof(value)); };

  idx.write(kMagic);
  put(idx, kVersion);
  put(idx, code->code);
  put(idx, static_cast<uint64_t>(documents.size()));
  put(idx, static_cast<uint64_t>(documents.size() + 1));
  for (const auto& document : documents) {
    put(idx, static_cast<int32_t>(document.size()));
  }
  int64_t pointer = 0;
  for (const auto& document : documents) {
    put(idx, pointer);
    pointer += static_cast<int64_t>(document.size()) * code->bytes;
  }
  for (size_t i = 0; i <= documents.size(); ++i) {
    put(idx, static_cast<int64_t>(i));
  }

  with_stored_type(dtype, [&](auto stored) {
    using Stored = decltype(stored);
    for (const auto& document : documents) {
      std::vector<Stored> tokens;
      for (const int64_t token : document) {
        const bool fits = token >= int64_t{std::numeric_limits<Stored>::min()} &&
                          token <= int64_t{std::numeric_limits<Stored>::max()};
        check(kKind, fits, "token ", token, " does not fit ", c10::toString(dtype), " of ",
              token_path(prefix, ".bin"));
        tokens.push_back(static_cast<Stored>(token));
      }
      bin.write(tokens.data(), tokens.size() * sizeof(Stored));
    }
  });
  bin.commit();
  idx.commit();
}

}  // namespace drrl
