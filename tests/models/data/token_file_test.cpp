#include "models/data/token_file.h"

#include <random>

#include "models/causal_lm/tokenizer.h"
#include "tests/support/io_support.h"

namespace drrl {
namespace {

using test::expect_error;
using test::TemporaryDirectory;
using test::write_bytes;

// The fields of an .idx, free to be wrong.
struct Index {
  std::string magic = std::string("MMIDIDX\0\0", 9);
  uint64_t version = 1;
  uint8_t code = 8;
  std::vector<int32_t> sizes = {3, 0, 2};
  std::vector<int64_t> pointers = {0, 6, 6};
  std::vector<int64_t> documents = {0, 2, 3};
  uint64_t sequence_count = 3;
  uint64_t document_count = 3;
  std::string tail;

  std::string bytes() const {
    std::string result = magic;
    const auto put = [&](const auto& value) {
      result.append(reinterpret_cast<const char*>(&value), sizeof(value));
    };
    put(version);
    put(code);
    put(sequence_count);
    put(document_count);
    std::for_each(sizes.begin(), sizes.end(), put);
    std::for_each(pointers.begin(), pointers.end(), put);
    std::for_each(documents.begin(), documents.end(), put);
    return result + tail;
  }
};

const std::string kFiveTokens = std::string("\1\0\2\0\3\0\4\0\5\0", 10);

TEST(TokenFile, RoundTripOfEveryDtype) {
  const TemporaryDirectory folder;
  const std::vector<std::vector<int64_t>> documents = {{1, 2, 3}, {}, {4, 5, 100, 0}};
  for (const auto dtype : {at::kByte, at::kChar, at::kShort, at::kUInt16, at::kInt, at::kLong}) {
    SCOPED_TRACE(c10::toString(dtype));
    write_token_file(folder / "tokens", documents, dtype);
    for (const char* spelling : {"tokens", "tokens.bin", "tokens.idx"}) {
      const TokenFile file = TokenFile::open(folder / spelling);
      EXPECT_EQ(file.tokens(), 7);
      EXPECT_EQ(file.sequences(), 3);
      EXPECT_EQ(file.documents(), 3);
      EXPECT_EQ(file.dtype(), dtype);
      const at::Tensor all = file.read(0, 7);
      EXPECT_EQ(all.scalar_type(), at::kLong);
      EXPECT_TRUE(at::equal(all, at::tensor({1, 2, 3, 4, 5, 100, 0}, at::kLong)));
      EXPECT_TRUE(at::equal(file.read(2, 3), all.narrow(0, 2, 3)));
      EXPECT_EQ(file.read(7, 0).numel(), 0);
    }
  }
  write_token_file(folder / "big", {{65535, 40000}}, at::kUInt16);
  EXPECT_TRUE(
      at::equal(TokenFile::open(folder / "big").read(0, 2), at::tensor({65535, 40000}, at::kLong)));
  write_token_file(folder / "none", {});
  EXPECT_EQ(TokenFile::open(folder / "none").tokens(), 0);
}

TEST(TokenFile, ReadsOutsideOfTheStreamAreRefused) {
  const TemporaryDirectory folder;
  write_token_file(folder / "t", {{1, 2, 3}});
  const TokenFile file = TokenFile::open(folder / "t");
  for (const auto& [start, length] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 4}, {3, 1}, {-1, 1}, {0, -1}, {1, INT64_MAX}, {INT64_MAX, 1}}) {
    expect_error(ErrorKind::kData,
                 {"t.bin", "has 3 tokens", std::to_string(length), std::to_string(start)},
                 [&] { file.read(start, length); });
  }
}

TEST(TokenFile, VocabularyIsChecked) {
  const TemporaryDirectory folder;
  std::vector<int64_t> tokens(3'000'000, 5);
  tokens[2'500'000] = 49152;
  tokens[2'600'000] = 50000;
  write_token_file(folder / "t", {tokens});
  const TokenFile file = TokenFile::open(folder / "t");
  EXPECT_NO_THROW(file.check_vocabulary(50001));
  expect_error(ErrorKind::kData, {"t.bin", "token 2500000 is 49152", "0 to 49151"},
               [&] { file.check_vocabulary(49152); });
  write_token_file(folder / "negative", {{1, 2}, {3, -7}}, at::kInt);
  expect_error(ErrorKind::kData, {"negative.bin", "token 3 is -7"},
               [&] { TokenFile::open(folder / "negative").check_vocabulary(100); });
}

TEST(TokenFile, WriterRefusesTokensThatDoNotFit) {
  const TemporaryDirectory folder;
  expect_error(ErrorKind::kData, {"token 65536", "UInt16", "t.bin"},
               [&] { write_token_file(folder / "t", {{1, 65536}}); });
  expect_error(ErrorKind::kData, {"token -1"}, [&] { write_token_file(folder / "t", {{-1}}); });
  EXPECT_TRUE(test::listing(folder.path()).empty());
}

struct Hostile {
  std::string what;
  std::string idx;
  std::string bin;
  std::vector<std::string> fragments;
};

std::vector<Hostile> hostile_indexes() {
  const auto with = [](const std::function<void(Index&)>& change) {
    Index index;
    change(index);
    return index.bytes();
  };
  const std::string good = Index().bytes();
  return {
      {"empty", "", kFiveTokens, {"t.idx", "0 bytes", "34"}},
      {"short", good.substr(0, 33), kFiveTokens, {"t.idx", "33 bytes"}},
      {"magic", with([](Index& i) { i.magic[0] = 'X'; }), kFiveTokens, {"t.idx", "MMIDIDX"}},
      {"old format",
       with([](Index& i) { i.magic = std::string("TNTIDX\0\0\0", 9); }),
       kFiveTokens,
       {"not a Megatron-LM index"}},
      {"version",
       with([](Index& i) { i.version = 2; }),
       kFiveTokens,
       {"version 2", "version 1 is supported"}},
      {"float tokens", with([](Index& i) { i.code = 7; }), kFiveTokens, {"dtype code 7", "uint16"}},
      {"dtype 0", with([](Index& i) { i.code = 0; }), kFiveTokens, {"dtype code 0"}},
      {"huge sequence count",
       with([](Index& i) { i.sequence_count = UINT64_MAX; }),
       kFiveTokens,
       {"18446744073709551615 sequences", "do not fit"}},
      {"sequence count that wraps",
       with([](Index& i) { i.sequence_count = (uint64_t{1} << 62) + 3; }),
       kFiveTokens,
       {"do not fit"}},
      {"huge document count",
       with([](Index& i) { i.document_count = uint64_t{1} << 61; }),
       kFiveTokens,
       {"2305843009213693952 document indices"}},
      {"one sequence too many",
       with([](Index& i) { i.sequence_count = 4; }),
       kFiveTokens,
       {"4 sequences", "truncated"}},
      {"one sequence too few",
       with([](Index& i) { i.sequence_count = 2; }),
       kFiveTokens,
       {"2 sequences", "bytes"}},
      {"cut", good.substr(0, good.size() - 1), kFiveTokens, {"do not fit"}},
      {"extra byte", good + "x", kFiveTokens, {"has 95 bytes", "take 94"}},
      {"multimodal",
       with([](Index& i) { i.tail = std::string(3, '\0'); }),
       kFiveTokens,
       {"multimodal"}},
      {"negative size",
       with([](Index& i) { i.sizes[1] = -1; }),
       kFiveTokens,
       {"sequence 1 has -1 tokens"}},
      {"size beyond the bin",
       with([](Index& i) { i.sizes[2] = 2000000000; }),
       kFiveTokens,
       {"sequence 2 ends at token 2000000003", "10 bytes", "t.bin"}},
      {"pointers fall",
       with([](Index& i) { i.pointers = {0, 6, 4}; }),
       kFiveTokens,
       {"sequence 2 points to byte 4", "expected 6"}},
      {"pointer leaves a gap",
       with([](Index& i) { i.pointers = {0, 6, 8}; }),
       kFiveTokens,
       {"points to byte 8", "expected 6"}},
      {"negative pointer",
       with([](Index& i) { i.pointers[0] = -2; }),
       kFiveTokens,
       {"sequence 0 points to byte -2", "expected 0"}},
      {"another item size",
       with([](Index& i) { i.code = 4; }),
       kFiveTokens,
       {"sequence 0 ends at token 3", "2 tokens"}},
      {"truncated bin", good, kFiveTokens.substr(0, 9), {"t.bin", "9 bytes", "truncated"}},
      {"long bin", good, kFiveTokens + "xx", {"t.bin", "has 12 bytes", "5 tokens", "10 bytes"}},
      {"odd byte", good, kFiveTokens + "x", {"has 11 bytes"}},
      {"no documents",
       with([](Index& i) {
         i.documents = {};
         i.document_count = 0;
       }),
       kFiveTokens,
       {"no document indices"}},
      {"documents begin late",
       with([](Index& i) { i.documents = {1, 2, 3}; }),
       kFiveTokens,
       {"document index 0 is 1", "expected 0"}},
      {"documents fall",
       with([](Index& i) { i.documents = {0, 3, 2}; }),
       kFiveTokens,
       {"document index 2 is 2", "from 3 to 3"}},
      {"documents beyond",
       with([](Index& i) { i.documents = {0, 2, 4}; }),
       kFiveTokens,
       {"document index 2 is 4", "from 2 to 3"}},
      {"documents end early",
       with([](Index& i) { i.documents = {0, 1, 2}; }),
       kFiveTokens,
       {"last document index is 2", "sequences, 3"}},
  };
}

TEST(TokenFile, HostileIndexesAreRefusedByName) {
  const TemporaryDirectory folder;
  for (const Hostile& item : hostile_indexes()) {
    SCOPED_TRACE(item.what);
    write_bytes(folder / "t.idx", item.idx);
    write_bytes(folder / "t.bin", item.bin);
    expect_error(ErrorKind::kData, item.fragments, [&] { TokenFile::open(folder / "t"); });
  }
  write_bytes(folder / "t.idx", Index().bytes());
  write_bytes(folder / "t.bin", kFiveTokens);
  EXPECT_EQ(TokenFile::open(folder / "t").tokens(), 5)
      << "the cases above must fail for their own reason";
  std::filesystem::remove(folder / "t.bin");
  expect_error(ErrorKind::kData, {"t.bin", "No such file"}, [&] { TokenFile::open(folder / "t"); });
  std::filesystem::remove(folder / "t.idx");
  expect_error(ErrorKind::kData, {"t.idx", "No such file"}, [&] { TokenFile::open(folder / "t"); });
}

TEST(TokenFile, MutationsAreRefusedOrHarmless) {
  const TemporaryDirectory folder;
  write_token_file(folder / "t", {{1, 2, 3}, {4}, {}, {5, 6}}, at::kInt);
  const std::string original = test::read_bytes(folder / "t.idx");
  std::mt19937 random(7);
  int refused = 0;
  int accepted = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string bytes = original;
    for (size_t edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % bytes.size();
      switch (random() % 5) {
        case 0: bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8)); break;
        case 1: bytes[at] = static_cast<char>(random()); break;
        case 2: bytes[at] = static_cast<char>(random() % 2 == 0 ? 0xff : 0); break;
        case 3: bytes.erase(at, 1 + random() % 9); break;
        default: bytes.insert(at, 1 + random() % 9, '\0'); break;
      }
      bytes.resize(std::max<size_t>(bytes.size(), 1));
    }
    write_bytes(folder / "t.idx", bytes);
    try {
      const TokenFile file = TokenFile::open(folder / "t");
      ASSERT_LE(file.tokens() * c10::elementSize(file.dtype()), 24U);
      ASSERT_EQ(file.read(0, file.tokens()).numel(), file.tokens());
      file.find_out_of_vocabulary(100);
      ++accepted;
    } catch (const Error& error) {
      ASSERT_EQ(error.kind(), ErrorKind::kData);
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
  EXPECT_GT(accepted, 10);
}

TEST(TokenFile, ReadsWhatAnIndependentWriterWrote) {
  if (std::string(DRRL_PYTHON).empty()) {
    GTEST_SKIP() << "no Python";
  }
  const TemporaryDirectory folder;
  test::run_oracle("tokens '" + (folder / "t").string() + "'");
  const TokenFile file = TokenFile::open(folder / "t");
  EXPECT_EQ(file.sequences(), 100);
  EXPECT_EQ(file.documents(), 50);
  EXPECT_EQ(file.tokens(), 4950);  // sequence i has i tokens, all of them 600 i
  EXPECT_TRUE(at::equal(file.read(4950 - 99, 99), at::full({99}, 59400, at::kLong)));
  EXPECT_TRUE(at::equal(file.read(0, 4), at::tensor({600, 1200, 1200, 1800}, at::kLong)));
}

TEST(Tokenizer, IsToldByItsWords) {
  const TemporaryDirectory folder;
  const auto words = [&](const std::string& vocabulary, const std::string& added = "") {
    write_bytes(folder / "tokenizer.json", R"({"added_tokens": [)" + added +
                                               R"(], "model": {"type": "BPE", "vocab": )" +
                                               vocabulary + "}}");
  };
  const auto note = [&](const std::string& text) { write_bytes(folder / "text.json", text); };
  const auto compare = [&] { check_tokenizer(folder / "text", folder.path()); };
  EXPECT_NO_THROW(compare());  // neither is there
  words(R"({"b": 1, "é": 0})");
  EXPECT_NO_THROW(compare());
  // printf '0\té\n1\tb\n' | sha1sum
  const std::string made = R"({"tokens": 3, "vocabulary": {"tokenizer": "their/tokenizer.json", )"
                           R"("size": 2, "sha1": "3c542fe110e29619a09c16166f92c1ada8204b14"}})";
  note(made);
  EXPECT_NO_THROW(compare());
  EXPECT_NO_THROW(check_tokenizer(folder / "text.bin", folder.path()));
  words("{\n \"é\": 0, \"b\": 1}",
        R"({"id": 2, "content": "<s>"})");  // saved anew, with one more added token
  EXPECT_NO_THROW(compare());
  words(R"([["é", 0.5], ["b", -1.5]])");
  EXPECT_NO_THROW(compare());
  for (const char* other : {R"({"b": 0, "é": 1})", R"({"b": 1, "é": 0, "c": 2})", "{}",
                            R"([["b", 0.5], ["é", -1.5]])"}) {
    words(other);
    expect_error(ErrorKind::kData,
                 {"text.json", "their/tokenizer.json", "2 words", "tokenizer.json",
                  "prepare.py text --model"},
                 compare);
  }
  for (const char* silent : {"3", "null"}) {
    words(silent);
    EXPECT_NO_THROW(compare());
  }
  for (const char* damaged : {"{\"b\": 0", R"({"b": "0"})", "[3]"}) {
    words(damaged);
    expect_error(ErrorKind::kModel, {"tokenizer.json"}, compare);
  }
  words(R"({"b": 0, "é": 1})");
  for (const char* other :
       {"{", "[]", "3", R"({"vocabulary": 3})",
        R"({"vocabulary": {"size": 2}})"}) {  // not of prepare.py, or of an older one
    note(other);
    EXPECT_NO_THROW(compare());
  }
}

}  // namespace
}  // namespace drrl
