#include <sys/stat.h>

#include <chrono>
#include <fstream>
#include <random>

#include "models/causal_lm/weight_store.h"
#include "tests/support/io_support.h"

namespace drrl {
namespace {

using test::expect_error;
using test::TemporaryDirectory;
using test::write_bytes;

std::string with_length(uint64_t length, const std::string& header, const std::string& data) {
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + header + data;
}

std::string file_of(const std::string& header, size_t data_bytes) {
  return with_length(header.size(), header, std::string(data_bytes, '\1'));
}

TEST(Safetensors, RoundTripOfEveryDtypeAndShape) {
  const TemporaryDirectory folder;
  std::vector<NamedTensor> tensors;
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble, at::kLong, at::kInt,
                           at::kShort, at::kChar, at::kByte, at::kBool}) {
    tensors.push_back(
        {c10::str("t.", c10::toString(dtype)), at::randint(0, 2, {3, 5}, at::kLong).to(dtype)});
  }
  tensors.push_back({"scalar", at::scalar_tensor(3.5)});
  tensors.push_back({"empty", at::empty({4, 0, 2})});
  tensors.push_back({"transposed", at::randn({6, 7}).t()});
  tensors.push_back({"needs grad", at::randn({2}).requires_grad_()});
  tensors.push_back({"quote \" and \xc3\xa4", at::randn({1})});
  const FileDigest digest = write_safetensors(folder / "a.safetensors", tensors,
                                              {{"format", "pt"}, {"note", "x"}});
  EXPECT_EQ(digest.bytes, std::filesystem::file_size(folder / "a.safetensors"));
  EXPECT_EQ(test::listing(folder.path()), std::vector<std::string>{"a.safetensors"});

  const SafetensorsFile file(folder / "a.safetensors");
  EXPECT_EQ(file.entries().size(), tensors.size());
  EXPECT_EQ(file.metadata().at("note"), "x");
  for (const auto& [name, value] : tensors) {
    const at::Tensor read = file.tensor(name);
    EXPECT_EQ(read.scalar_type(), value.scalar_type()) << name;
    EXPECT_TRUE(read.is_contiguous()) << name;
    EXPECT_TRUE(at::equal(read, value)) << name;
    EXPECT_EQ(file.entry(name).offset % value.element_size(), 0U) << name << " is not aligned";
  }
  EXPECT_EQ(FileReader(folder / "a.safetensors", ErrorKind::kModel).digest().xxh3, digest.xxh3);
}

TEST(Safetensors, SlicesOfEveryDimension) {
  const TemporaryDirectory folder;
  const at::Tensor value = at::randn({5, 6, 7}).to(at::kBFloat16);
  write_safetensors(folder / "a.safetensors", {{"v", value}, {"w", at::ones({3})}});
  const SafetensorsFile file(folder / "a.safetensors");
  for (int64_t dim = 0; dim < 3; ++dim) {
    const int64_t extent = value.size(dim);
    for (int64_t start = 0; start <= extent; ++start) {
      for (int64_t length = 0; start + length <= extent; ++length) {
        EXPECT_TRUE(
            at::equal(file.slice("v", dim, start, length), value.narrow(dim, start, length)))
            << dim << " " << start << " " << length;
      }
    }
  }
  expect_error(ErrorKind::kModel, {"a.safetensors", "\"v\"", "3 dimensions", "dimension 3"},
               [&] { file.slice("v", 3, 0, 1); });
  expect_error(ErrorKind::kModel, {"extent 6", "2 indices from 5"},
               [&] { file.slice("v", 1, 5, 2); });
  expect_error(ErrorKind::kModel, {"extent 6"}, [&] { file.slice("v", 1, -1, 1); });
  expect_error(ErrorKind::kModel, {"extent 6"}, [&] { file.slice("v", 1, 3, INT64_MAX); });
  expect_error(ErrorKind::kModel, {"no tensor \"u\"", "2 others"}, [&] { file.tensor("u"); });
}

TEST(Safetensors, UnalignedTensorsAreRead) {
  const TemporaryDirectory folder;
  const float value = 1.5F;
  const std::string header = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}} )";
  write_bytes(
      folder / "u.safetensors",
      with_length(header.size(), header,
                  std::string(1, '\7') + std::string(reinterpret_cast<const char*>(&value), 4)));
  const SafetensorsFile file(folder / "u.safetensors");
  EXPECT_EQ(file.tensor("a").item<int>(), 7);
  EXPECT_EQ(file.tensor("b").item<float>(), value);
}

struct Hostile {
  const char* what;
  std::string bytes;
  std::vector<const char*> fragments;
};

// A file of one tensor "a" with these fields.
std::string file_of_one(const std::string& fields, size_t data = 8) {
  return file_of("{\"a\":{" + fields + "}}", data);
}

// The length before the header, and the header as JSON.
std::vector<Hostile> hostile_headers() {
  const std::string good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  std::string flipped = good;
  flipped[10] = static_cast<char>(flipped[10] ^ 0x80);
  return {
      {"empty file", "", {"0 bytes", "at least 8"}},
      {"seven bytes", std::string(7, '\0'), {"7 bytes", "at least 8"}},
      {"header longer than the file",
       with_length(1000, good, ""),
       {"claims 1000 bytes", "truncated"}},
      {"huge header",
       with_length(UINT64_MAX, good, ""),
       {"claims 18446744073709551615 bytes", "at most 100000000"}},
      {"huge header that wraps around with its own length",
       with_length(UINT64_MAX - 7, good, ""),
       {"18446744073709551608"}},
      {"header beyond the limit", with_length(100'000'001, good, ""), {"claims 100000001 bytes"}},
      {"empty header", with_length(0, "", ""), {"does not begin with '{'"}},
      {"another format",
       with_length(8, "PK\3\4abcd", ""),
       {"does not begin with '{'", "is this a safetensors file?"}},
      {"cut header",
       with_length(good.size() - 3, good.substr(0, good.size() - 3), ""),
       {"not valid JSON"}},
      {"bit flip that breaks UTF-8", file_of(flipped, 8), {"not valid JSON"}},
      {"text after the header", file_of(good + "x", 8), {"not valid JSON"}},
      {"name that is not UTF-8",
       file_of("{\"\xff\xfe\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
       {"not valid JSON"}},
      {"deep nesting", file_of("{\"a\":" + std::string(100000, '[') + "}", 8), {"nests deeper"}},
      {"deep nesting of objects", file_of("{\"a\":{\"b\":{\"c\":{}}}}", 8), {"nests deeper"}},
      {"long list",
       file_of_one("\"dtype\":\"F32\",\"shape\":[1" + std::string(2000, ' ') +
                   [] {
                     std::string list;
                     for (int i = 0; i < 1000; ++i) list += ",1";
                     return list;
                   }() +
                   "],\"data_offsets\":[0,8]"),
       {"longer than 16"}},
  };
}

// What a header says of a tensor.
std::vector<Hostile> hostile_entries() {
  return {
      {"duplicate tensor",
       file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
               R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
               8),
       {"\"a\" occurs twice"}},
      {"duplicate field",
       file_of_one(R"("dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8])"),
       {"\"shape\" occurs twice"}},
      {"entry is not an object",
       file_of(R"({"a":7})", 0),
       {"tensor \"a\"", "7", "not by an object"}},
      {"no dtype", file_of_one(R"("shape":[2],"data_offsets":[0,8])"), {"\"a\" has no \"dtype\""}},
      {"no shape", file_of_one(R"("dtype":"F32","data_offsets":[0,8])"), {"no \"shape\""}},
      {"no offsets", file_of_one(R"("dtype":"F32","shape":[2])"), {"no \"data_offsets\""}},
      {"unknown dtype",
       file_of_one(R"("dtype":"F33","shape":[2],"data_offsets":[0,8])"),
       {"dtype \"F33\"", "supported are F32"}},
      {"8-bit floats",
       file_of_one(R"("dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8])"),
       {"F8_E4M3", "supported are"}},
      {"dtype is a number",
       file_of_one(R"("dtype":4,"shape":[2],"data_offsets":[0,8])"),
       {"dtype 4"}},
      {"negative extent",
       file_of_one(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"),
       {"shape is [-2]", "from 0"}},
      {"fractional extent",
       file_of_one(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"),
       {"shape is [2.0]"}},
      {"extent beyond int64",
       file_of_one(R"("dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8])"),
       {"9223372036854775808"}},
      {"extent beyond uint64",
       file_of_one(R"("dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8])"),
       {"shape is [1e+20]"}},
      {"shape is a string",
       file_of_one(R"("dtype":"F32","shape":"2","data_offsets":[0,8])"),
       {"shape is \"2\"", "not a list"}},
      {"product that wraps to the right size",
       file_of_one(R"("dtype":"F32","shape":[4611686018427387905,2],"data_offsets":[0,8])"),
       {"overflows"}},
      {"overflow hidden behind a zero",
       file_of_one(R"("dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0])", 0),
       {"overflows"}},
      {"size of another shape",
       file_of_one(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"),
       {"span 8 bytes", "takes 12"}},
      {"size of another dtype",
       file_of_one(R"("dtype":"F64","shape":[2],"data_offsets":[0,8])"),
       {"span 8 bytes", "takes 16"}},
  };
}

// Where tensors lie in the file, and the metadata.
std::vector<Hostile> hostile_places() {
  return {
      {"end before begin",
       file_of_one(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"),
       {"[8,0]", "begin <= end"}},
      {"one offset",
       file_of_one(R"("dtype":"F32","shape":[2],"data_offsets":[0])"),
       {"expected [begin, end]"}},
      {"three offsets",
       file_of_one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"),
       {"expected [begin, end]"}},
      {"offsets beyond the file",
       file_of_one(R"("dtype":"F32","shape":[2],"data_offsets":[8,16])"),
       {"[8,16]", "only 8 bytes", "truncated"}},
      {"offsets near 2^63",
       file_of_one(
           R"("dtype":"F32","shape":[2],"data_offsets":[9223372036854775799,9223372036854775807])"),
       {"only 8 bytes"}},
      {"negative offset",
       file_of_one(R"("dtype":"F32","shape":[2],"data_offsets":[-8,0])"),
       {"data_offsets is [-8,0]"}},
      {"truncated data",
       file_of_one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])", 7),
       {"only 7 bytes", "truncated"}},
      {"data after the last tensor",
       file_of_one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])", 9),
       {"end at byte 8", "has 9"}},
      {"data and no tensor", file_of("{}", 1), {"end at byte 0", "has 1"}},
      {"hole at the beginning",
       file_of_one(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])"),
       {"bytes 0 to 4", "belong to no tensor"}},
      {"overlap",
       file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
               R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
               8),
       {"\"b\" begins at byte 4", "inside tensor \"a\"", "ends at 8"}},
      {"same bytes twice",
       file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
               R"("b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
               8),
       {"inside tensor \"a\""}},
      {"hole between",
       file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
               R"("b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
               12),
       {"bytes 4 to 8", "before tensor \"b\""}},
      {"empty tensor inside another",
       file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
               R"("b":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}})",
               8),
       {"\"b\" begins at byte 4"}},
      {"metadata is a list", file_of(R"({"__metadata__":[]})", 0), {"__metadata__ is []"}},
      {"metadata value is a number",
       file_of(R"({"__metadata__":{"k":1}})", 0),
       {"\"k\" is 1", "not a string"}},
  };
}

TEST(Safetensors, HostileFilesAreRefusedByName) {
  const TemporaryDirectory folder;
  std::vector<Hostile> files = hostile_headers();
  for (const auto& more : {hostile_entries(), hostile_places()}) {
    files.insert(files.end(), more.begin(), more.end());
  }
  for (const Hostile& item : files) {
    SCOPED_TRACE(item.what);
    write_bytes(folder / "hostile.safetensors", item.bytes);
    std::vector<std::string> fragments(item.fragments.begin(), item.fragments.end());
    fragments.emplace_back("hostile.safetensors");
    expect_error(ErrorKind::kModel, fragments,
                 [&] { SafetensorsFile(folder / "hostile.safetensors"); });
  }
  expect_error(ErrorKind::kModel, {"missing.safetensors", "No such file"},
               [&] { SafetensorsFile(folder / "missing.safetensors"); });
  expect_error(ErrorKind::kModel, {"not a regular file"}, [&] { SafetensorsFile(folder.path()); });
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  expect_error(ErrorKind::kCheckpoint, {"pipe", "not a regular file"},
               [&] { SafetensorsFile(folder / "pipe", ErrorKind::kCheckpoint); });
}

// A file of a few megabytes must not take minutes.
TEST(Safetensors, ManyTensorsAreReadInTimeProportionalToTheirNumber) {
  const TemporaryDirectory folder;
  std::string header = "{";
  for (int i = 0; i < 40000; ++i) {
    header += (i == 0 ? "\"" : ",\"") + std::to_string(i) +
              R"(":{"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
  }
  header += "}";
  write_bytes(folder / "many", file_of(header, 0));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(SafetensorsFile(folder / "many").entries().size(), 40000U);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

TEST(Safetensors, FileCutAfterOpeningIsAnErrorNotACrash) {
  const TemporaryDirectory folder;
  write_safetensors(folder / "a.safetensors", {{"v", at::ones({1000})}});
  const SafetensorsFile file(folder / "a.safetensors");
  std::filesystem::resize_file(folder / "a.safetensors", 2000);
  expect_error(ErrorKind::kModel, {"a.safetensors", "ends at byte 2000", "was cut since"},
               [&] { file.tensor("v"); });
}

// Whatever a mutation does, the reader either refuses with drrl::Error or every tensor it offers
// can be read from inside the file.
TEST(Safetensors, MutationsAreRefusedOrHarmless) {
  const TemporaryDirectory folder;
  const auto path = folder / "m.safetensors";
  write_safetensors(path, {{"model.a", at::randn({3, 4})},
                           {"model.b", at::randn({2, 3}).to(at::kBFloat16)},
                           {"c", at::empty({0})}});
  const std::string original = test::read_bytes(path);
  const size_t header = 8 +
                        static_cast<size_t>(*reinterpret_cast<const uint64_t*>(original.data()));
  std::mt19937 random(20251216);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  const std::string alphabet = "0123456789[]{}:,\"-.e FBINUOL_";
  int refused = 0;
  int accepted = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string bytes = original;
    for (size_t edits = 1 + below(3); edits > 0; --edits) {
      const size_t at = below(below(8) == 0 ? bytes.size() : std::min(header, bytes.size()));
      switch (below(6)) {
        case 0: bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8))); break;
        case 1: bytes[at] = alphabet[below(alphabet.size())]; break;
        case 2: bytes.insert(at, 1, alphabet[below(alphabet.size())]); break;
        case 3: bytes.erase(at, 1 + below(4)); break;
        case 4: bytes[8 + below(header - 8)] = static_cast<char>('0' + below(10)); break;
        default: bytes.resize(below(16) == 0 ? 8 + at : bytes.size()); break;
      }
      bytes.resize(std::max<size_t>(bytes.size(), 9));
    }
    write_bytes(path, bytes);
    try {
      const SafetensorsFile file(path);
      for (const auto& [name, entry] : file.entries()) {
        ASSERT_LE(entry.offset + entry.bytes, bytes.size());
        const at::Tensor value = file.tensor(name);
        ASSERT_EQ(static_cast<uint64_t>(value.nbytes()), entry.bytes);
        ASSERT_EQ(std::memcmp(value.data_ptr(), bytes.data() + entry.offset, entry.bytes), 0);
        for (int64_t dim = 0; dim < value.dim(); ++dim) {
          ASSERT_TRUE(at::equal(
              file.slice(name, dim, value.size(dim) / 2, value.size(dim) - value.size(dim) / 2)
                  .view(at::kByte),
              value.narrow(dim, value.size(dim) / 2, value.size(dim) - value.size(dim) / 2)
                  .contiguous()
                  .view(at::kByte)));
        }
      }
      ++accepted;
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
  EXPECT_GT(accepted, 100) << "the mutations are too coarse to reach the data";
}

TEST(Safetensors, FullDiskLeavesNothingBehindAndTheOldFileAlone) {
  const TemporaryDirectory folder;
  write_safetensors(folder / "a.safetensors", {{"v", at::ones({10})}});
  const std::string before = test::read_bytes(folder / "a.safetensors");
  {
    const test::FileSizeLimit limit(4096);
    expect_error(ErrorKind::kStorage, {"a.safetensors", "after 4096 bytes", "File too large"},
                 [&] { write_safetensors(folder / "a.safetensors", {{"v", at::zeros({5000})}}); });
  }
  EXPECT_EQ(test::read_bytes(folder / "a.safetensors"), before);
  EXPECT_EQ(test::listing(folder.path()), std::vector<std::string>{"a.safetensors"});
  expect_error(ErrorKind::kStorage, {"nowhere", "No such file"},
               [&] { write_safetensors(folder / "nowhere" / "a", {}); });
}

TEST(Safetensors, WriterRefusesWhatTheFormatCannotHold) {
  const TemporaryDirectory folder;
  expect_error(ErrorKind::kInternal, {"two tensors", "\"v\""}, [&] {
    write_safetensors(folder / "a", {{"v", at::ones({1})}, {"v", at::ones({1})}});
  });
  expect_error(ErrorKind::kInternal, {"\"v\"", "ComplexFloat"},
               [&] { write_safetensors(folder / "a", {{"v", at::ones({1}, at::kComplexFloat)}}); });
  EXPECT_TRUE(test::listing(folder.path()).empty());
}

TEST(WeightStore, OneFileAndShards) {
  const at::Tensor a = at::randn({4, 6}).to(at::kHalf);
  const at::Tensor b = at::randn({3});
  const TemporaryDirectory single;
  write_safetensors(single / "model.safetensors", {{"a", a}, {"b", b}});
  const TemporaryDirectory sharded;
  write_safetensors(sharded / "model-00001-of-00002.safetensors", {{"a", a}});
  write_safetensors(sharded / "model-00002-of-00002.safetensors", {{"b", b}});
  write_bytes(sharded / "model.safetensors.index.json",
              R"({"metadata":{"total_size":60},)"
              R"("weight_map":{"a":"model-00001-of-00002.safetensors",)"
              R"("b":"model-00002-of-00002.safetensors"}})");
  for (const auto* folder : {&single, &sharded}) {
    const WeightStore store = WeightStore::open(folder->path());
    EXPECT_EQ(store.names(), (std::vector<std::string>{"a", "b"}));
    EXPECT_TRUE(store.contains("a"));
    EXPECT_FALSE(store.contains("c"));
    EXPECT_EQ(store.shape("a"), (std::vector<int64_t>{4, 6}));
    EXPECT_EQ(store.dtype("a"), at::kHalf);
    EXPECT_TRUE(at::equal(store.tensor("a"), a.to(at::kFloat)));
    EXPECT_TRUE(at::equal(store.tensor("a", at::kHalf), a));
    EXPECT_TRUE(
        at::equal(store.slice("a", 1, 2, 3, at::kBFloat16), a.narrow(1, 2, 3).to(at::kBFloat16)));
    EXPECT_TRUE(at::equal(store.tensor("b"), b));
    expect_error(ErrorKind::kModel, {folder->path().string(), "no tensor \"c\""},
                 [&] { store.tensor("c"); });
  }
}

TEST(WeightStore, SamplesTellFilesApart) {
  const TemporaryDirectory folder;
  const auto sample_with = [&](at::Tensor large, at::Tensor small) {
    write_safetensors(folder / "model.safetensors",
                      {{"large", large}, {"small", small}, {"empty", at::empty({0})}});
    return WeightStore::open(folder.path()).sample();
  };
  const at::Tensor large = at::zeros({9000}), small = at::zeros({3});
  const FileDigest before = sample_with(large, small);
  EXPECT_EQ(before.bytes, std::filesystem::file_size(folder / "model.safetensors"));
  EXPECT_EQ(sample_with(large, small).xxh3, before.xxh3);
  EXPECT_NE(sample_with(large, small + 1).xxh3, before.xxh3);
  for (const int64_t index : {0, 4500, 8999}) {
    at::Tensor other = large.clone();
    other[index] = 1;
    EXPECT_NE(sample_with(other, small).xxh3, before.xxh3) << index;
  }
  at::Tensor unseen = large.clone();
  unseen[2000] = 1;
  EXPECT_EQ(sample_with(unseen, small).xxh3, before.xxh3) << "a large tensor is not read";
  EXPECT_NE(sample_with(large.view({90, 100}), small).xxh3, before.xxh3);
}

TEST(FileReader, ReadsPiecesOfLargeFiles) {
  EXPECT_EQ(pieces_of({5, 30}, 3, 10).size(), 1U);
  const auto pieces = pieces_of({5, 95}, 3, 10);
  ASSERT_EQ(pieces.size(), 3U);
  EXPECT_EQ(pieces[0].offset, 5U);
  EXPECT_EQ(pieces[1].offset, 47U);
  EXPECT_EQ(pieces[2].offset + pieces[2].bytes, 100U);
  const TemporaryDirectory folder;
  const std::string text = "a text that is hashed";
  write_bytes(folder / "text", text);
  const FileReader file(folder / "text", ErrorKind::kData);
  EXPECT_EQ(file.sample().xxh3, file.digest().xxh3);
  EXPECT_EQ(file.sample().bytes, text.size());
  write_bytes(folder / "part", text.substr(0, 3) + text.substr(10, 4));
  EXPECT_EQ(file.digest({{0, 3}, {10, 4}}).xxh3,
            FileReader(folder / "part", ErrorKind::kData).digest().xxh3);
  EXPECT_EQ(file.digest({{0, 3}, {10, 4}}).bytes, 7U);
  write_bytes(folder / "large", "");
  std::filesystem::resize_file(folder / "large", (uint64_t{64} << 20) + 1000);  // a hole
  const uint64_t before = FileReader(folder / "large", ErrorKind::kData).sample().xxh3;
  std::fstream(folder / "large", std::ios::in | std::ios::out).seekp(-1, std::ios::end) << 'x';
  EXPECT_NE(FileReader(folder / "large", ErrorKind::kData).sample().xxh3, before);
}

TEST(WeightStore, BadDirectoriesAreRefusedByName) {
  const TemporaryDirectory folder;
  const auto open = [&] { WeightStore::open(folder.path()); };
  expect_error(ErrorKind::kModel, {"nothing", "not a folder"},
               [&] { WeightStore::open(folder / "nothing"); });
  expect_error(ErrorKind::kModel, {"cannot look at", "too long"},
               [&] { WeightStore::open(folder / std::string(5000, 'x')); });
  std::filesystem::create_symlink("loop", folder / "loop");
  expect_error(ErrorKind::kModel, {"cannot look at", "loop"},
               [&] { WeightStore::open(folder / "loop"); });
  expect_error(ErrorKind::kModel, {folder.path().string(), "neither model.safetensors nor"}, open);
  write_bytes(folder / "pytorch_model.bin", "x");
  expect_error(ErrorKind::kModel, {"pytorch_model.bin", "safe_serialization"}, open);

  const auto index = [&](const std::string& text) {
    write_bytes(folder / "model.safetensors.index.json", text);
  };
  write_safetensors(folder / "s.safetensors", {{"a", at::ones({1})}});
  index("{");
  expect_error(ErrorKind::kModel, {"index.json", "not valid JSON"}, open);
  index("{}");
  expect_error(ErrorKind::kModel, {"index.json", "weight_map"}, open);
  index("{\"weight_map\":" + std::string(200'000, '{'));
  expect_error(ErrorKind::kModel, {"index.json", "nests deeper"}, open);
  index(R"({"weight_map":{"a":7}})");
  expect_error(ErrorKind::kModel, {"\"a\"", "7"}, open);
  for (const char* escape :
       {"../s.safetensors", "/etc/passwd", "..", "", "s.safetensors\\u0000x"}) {
    index(std::string(R"({"weight_map":{"a":")") + escape + "\"}}");
    expect_error(ErrorKind::kModel, {"\"a\"", "not the name of a file in the same folder"}, open);
  }
  index(R"({"weight_map":{"a":"gone.safetensors"}})");
  expect_error(ErrorKind::kModel, {"index.json", "\"a\"", "\"gone.safetensors\"", "no such file"},
               open);
  index(R"({"weight_map":{"b":"s.safetensors"}})");
  expect_error(ErrorKind::kModel, {"\"b\"", "\"s.safetensors\"", "not there"}, open);
  write_safetensors(folder / "t.safetensors", {{"a", at::zeros({1})}, {"b", at::ones({1})}});
  index(R"({"weight_map":{"a":"t.safetensors"}})");
  expect_error(ErrorKind::kModel, {"\"b\"", "\"t.safetensors\"", "not listed"}, open);
  index(R"({"weight_map":{"a":"s.safetensors","b":"t.safetensors"}})");
  expect_error(ErrorKind::kModel, {"\"a\"", "\"t.safetensors\"", "another file"}, open);
}

TEST(Safetensors, AgreesWithThePythonLibrary) {
  if (std::string(DRRL_PYTHON).empty()) {
    GTEST_SKIP() << "no Python with the safetensors library";
  }
  const TemporaryDirectory folder;
  // x[i] = i / 8 - 3 is exact in every floating dtype here, so that the script can rebuild it.
  const at::Tensor values = at::arange(24, at::kFloat).reshape({4, 6}) / 8 - 3;
  write_safetensors(folder / "ours.safetensors", {{"f32", values},
                                                  {"bf16", values.to(at::kBFloat16)},
                                                  {"f16", values.t().to(at::kHalf)},
                                                  {"i64", values.mul(8).to(at::kLong)},
                                                  {"u8", at::arange(7, at::kByte)},
                                                  {"empty", at::empty({0, 3})}});
  test::run_oracle("safetensors '" + (folder / "ours.safetensors").string() + "' '" +
                   (folder / "theirs.safetensors").string() + "'");
  const SafetensorsFile theirs(folder / "theirs.safetensors");
  EXPECT_EQ(theirs.metadata().at("format"), "pt");
  EXPECT_TRUE(at::equal(theirs.tensor("f32"), values));
  EXPECT_TRUE(at::equal(theirs.tensor("bf16"), values.to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(theirs.tensor("f16"), values.t().to(at::kHalf)));
  EXPECT_TRUE(at::equal(theirs.tensor("i64"), values.mul(8).to(at::kLong)));
  EXPECT_TRUE(at::equal(theirs.tensor("u8"), at::arange(7, at::kByte)));
  EXPECT_EQ(theirs.tensor("empty").sizes(), (std::vector<int64_t>{0, 3}));
}

}  // namespace
}  // namespace drrl
