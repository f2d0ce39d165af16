#include "core/io/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <optional>
#include <string_view>

#include <nlohmann/json.hpp>

namespace drrl {
namespace {

using Json = nlohmann::json;

static_assert(std::endian::native == std::endian::little,
              "the safetensors format is little endian");

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kLargestHeader = 100'000'000;  // as in the reference implementation
constexpr size_t kMostDimensions = 16;

struct DtypeName {
  std::string_view text;
  at::ScalarType dtype;
};

constexpr std::array kDtypes = {
    DtypeName{"F32", at::kFloat},  DtypeName{"BF16", at::kBFloat16}, DtypeName{"F16", at::kHalf},
    DtypeName{"F64", at::kDouble}, DtypeName{"I64", at::kLong},      DtypeName{"I32", at::kInt},
    DtypeName{"I16", at::kShort},  DtypeName{"I8", at::kChar},       DtypeName{"U8", at::kByte},
    DtypeName{"BOOL", at::kBool},
};

std::optional<at::ScalarType> dtype_of(std::string_view text) {
  const auto* found = std::find_if(kDtypes.begin(), kDtypes.end(),
                                   [&](const DtypeName& entry) { return entry.text == text; });
  return found == kDtypes.end() ? std::nullopt : std::optional(found->dtype);
}

// A JSON value as messages show it, short.
std::string shown(const Json& value) {
  const std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() <= 120 ? text : text.substr(0, 120) + "...";
}

// Builds the tree of a header, which is small by construction: it stops at depth 3 (name -> field
// -> list), at lists longer than any shape, and at a key that occurs twice in one object, which a
// JSON library would otherwise silently resolve.
class HeaderParser : public nlohmann::json_sax<Json> {
 public:
  HeaderParser(const std::filesystem::path& path, ErrorKind kind) : path_(path), kind_(kind) {}
  Json take() { return std::move(root_); }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t& /*text*/) override { return add(value); }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t& /*value*/) override { return false; }
  bool start_object(std::size_t /*size*/) override { return start(Json::object()); }
  bool start_array(std::size_t /*size*/) override { return start(Json::array()); }
  bool end_object() override { return end(); }
  bool end_array() override { return end(); }
  bool key(string_t& value) override {
    check(kind_, !open_.back().contains(value), path_, ": ", shown(value),
          " occurs twice in the header");
    keys_.back() = std::move(value);
    return true;
  }
  bool parse_error(std::size_t /*position*/, const std::string& /*token*/,
                   const nlohmann::detail::exception& error) override {
    raise(kind_, path_, ": the header is not valid JSON: ", error.what());
  }

 private:
  bool start(Json value) {
    constexpr size_t kDeepest = 3;
    check(kind_, open_.size() < kDeepest, path_,
          ": the header nests deeper than name -> field -> list");
    open_.push_back(std::move(value));
    keys_.emplace_back();
    return true;
  }
  bool end() {
    Json value = std::move(open_.back());
    open_.pop_back();
    keys_.pop_back();
    return add(std::move(value));
  }
  bool add(Json value) {
    if (open_.empty()) {
      root_ = std::move(value);
    } else if (open_.back().is_object()) {
      open_.back()[keys_.back()] = std::move(value);
    } else {
      check(kind_, open_.back().size() < kMostDimensions, path_,
            ": a list in the header is longer than ", kMostDimensions, " entries");
      open_.back().push_back(std::move(value));
    }
    return true;
  }

  const std::filesystem::path& path_;
  ErrorKind kind_;
  std::vector<Json> open_;         // objects and lists that have not ended
  std::vector<std::string> keys_;  // the last key of each
  Json root_;
};

Json parse_header(const std::string& text, const std::filesystem::path& path, ErrorKind kind) {
  HeaderParser parser(path, kind);
  Json::sax_parse(text, &parser);
  return parser.take();
}

// a list of non-negative integers that fit int64
std::vector<int64_t> integers(const Json& value, const std::string& what, ErrorKind kind) {
  check(kind, value.is_array(), what, " is ", shown(value), ", not a list of integers");
  std::vector<int64_t> result;
  for (const Json& item : value) {
    check(kind,
          item.is_number_unsigned() && item.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX),
          what, " is ", shown(value), "; every entry must be an integer from 0 to 2^63 - 1");
    result.push_back(item.get<int64_t>());
  }
  return result;
}

SafetensorsFile::Entry parse_entry(const std::string& name, const Json& value,
                                   const std::filesystem::path& path, ErrorKind kind,
                                   uint64_t data_bytes) {
  const std::string where = c10::str(path, ": tensor ", shown(name));
  check(kind, value.is_object(), where, " is described by ", shown(value), ", not by an object");
  for (const char* field : {"dtype", "shape", "data_offsets"}) {
    check(kind, value.contains(field), where, " has no \"", field, "\"");
  }
  const Json& dtype_text = value["dtype"];
  const auto dtype = dtype_text.is_string() ? dtype_of(dtype_text.get<std::string>())
                                            : std::nullopt;
  check(kind, dtype.has_value(), where, " has dtype ", shown(dtype_text),
        "; supported are F32, BF16, F16, F64, I64, I32, I16, I8, U8, BOOL");

  SafetensorsFile::Entry entry{*dtype, integers(value["shape"], where + ": shape", kind), 0, 0};
  // Zero extents are left out of the overflow check: strides are products of the other extents even
  // when there are no elements.
  auto expected = static_cast<int64_t>(c10::elementSize(*dtype));
  bool empty = false;
  for (const int64_t extent : entry.shape) {
    const bool overflow = __builtin_mul_overflow(expected, std::max<int64_t>(extent, 1), &expected);
    check(kind, !overflow, where, ": the size of shape ", shown(value["shape"]),
          " in bytes overflows 63 bits");
    empty = empty || extent == 0;
  }
  const uint64_t bytes = empty ? 0 : static_cast<uint64_t>(expected);

  const std::vector<int64_t> offsets = integers(value["data_offsets"], where + ": data_offsets",
                                                kind);
  check(kind, offsets.size() == 2 && offsets[0] <= offsets[1], where, ": data_offsets are ",
        shown(value["data_offsets"]), "; expected [begin, end] with begin <= end");
  const auto begin = static_cast<uint64_t>(offsets[0]);
  const auto end = static_cast<uint64_t>(offsets[1]);
  check(kind, end <= data_bytes, where, ": data_offsets are ", shown(value["data_offsets"]),
        ", but the file has only ", data_bytes, " bytes of data (truncated?)");
  check(kind, end - begin == bytes, where, ": data_offsets ", shown(value["data_offsets"]),
        " span ", end - begin, " bytes, but ", shown(dtype_text), " of shape ",
        shown(value["shape"]), " takes ", bytes);
  entry.offset = begin;
  entry.bytes = bytes;
  return entry;
}

// Every byte of the data belongs to exactly one tensor: hidden bytes and shared bytes are signs of
// a damaged or crafted file.
void check_layout(const std::map<std::string, SafetensorsFile::Entry>& entries,
                  const std::filesystem::path& path, ErrorKind kind, uint64_t data_bytes) {
  using Item = std::pair<const std::string, SafetensorsFile::Entry>;
  std::vector<const Item*> order;
  for (const Item& item : entries) {
    order.push_back(&item);
  }
  std::sort(order.begin(), order.end(), [](const Item* a, const Item* b) {
    return std::pair(a->second.offset, a->second.bytes) <
           std::pair(b->second.offset, b->second.bytes);
  });
  uint64_t end = 0;
  const Item* previous = nullptr;
  for (const Item* item : order) {
    check(kind, item->second.offset >= end, path, ": tensor ", shown(item->first),
          " begins at byte ", item->second.offset, " of the data, inside tensor ",
          previous == nullptr ? "" : shown(previous->first), ", which ends at ", end);
    check(kind, item->second.offset == end, path, ": bytes ", end, " to ", item->second.offset,
          " of the data, before tensor ", shown(item->first), ", belong to no tensor");
    end = item->second.offset + item->second.bytes;
    previous = item;
  }
  check(kind, end == data_bytes, path, ": the tensors end at byte ", end,
        " of the data, but the file has ", data_bytes);
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path, ErrorKind kind)
    : file_(path, kind) {
  check(kind, file_.size() >= kLengthBytes, path, " has ", file_.size(),
        " bytes; a safetensors file has at least ", kLengthBytes);
  uint64_t header_bytes = 0;
  file_.read(0, &header_bytes, kLengthBytes);
  check(kind, header_bytes <= kLargestHeader, path, ": the header claims ", header_bytes,
        " bytes; at most ", kLargestHeader, " are allowed (is this a safetensors file?)");
  check(kind, header_bytes <= file_.size() - kLengthBytes, path, ": the header claims ",
        header_bytes, " bytes, but the file has ", file_.size(), " (truncated?)");
  std::string text(header_bytes, '\0');
  file_.read(kLengthBytes, text.data(), header_bytes);
  check(kind, !text.empty() && text.front() == '{', path,
        ": the header does not begin with '{' (is this a safetensors file?)");

  const uint64_t data_begin = kLengthBytes + header_bytes;
  const uint64_t data_bytes = file_.size() - data_begin;
  const Json header = parse_header(text, path, kind);
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      check(kind, value.is_object(), path, ": __metadata__ is ", shown(value), ", not an object");
      for (const auto& [key, entry] : value.items()) {
        check(kind, entry.is_string(), path, ": __metadata__ ", shown(key), " is ", shown(entry),
              ", not a string");
        metadata_[key] = entry.get<std::string>();
      }
      continue;
    }
    entries_.emplace(name, parse_entry(name, value, path, kind, data_bytes));
  }
  check_layout(entries_, path, kind, data_bytes);
  for (auto& [name, entry] : entries_) {
    entry.offset += data_begin;
  }
}

const SafetensorsFile::Entry& SafetensorsFile::entry(const std::string& name) const {
  const auto found = entries_.find(name);
  check(file_.kind(), found != entries_.end(), file_.path(), " has no tensor ", shown(name),
        " (it has ", entries_.size(), " others)");
  return found->second;
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const Entry& info = entry(name);
  at::Tensor result = at::empty(info.shape, at::TensorOptions(info.dtype));
  file_.read(info.offset, result.data_ptr(), info.bytes);
  return result;
}

FileDigest SafetensorsFile::sample() const {
  constexpr uint64_t kPieces = 3, kBytes = 4096;
  uint64_t header = file_.size();
  std::vector<FileRegion> regions;
  for (const auto& [name, entry] : entries_) {
    header = std::min(header, entry.offset);
    const auto pieces = pieces_of({entry.offset, entry.bytes}, kPieces, kBytes);
    regions.insert(regions.end(), pieces.begin(), pieces.end());
  }
  regions.insert(regions.begin(), {0, header});
  return {file_.size(), file_.digest(regions).xxh3};
}

at::Tensor SafetensorsFile::slice(const std::string& name, int64_t dim, int64_t start,
                                  int64_t length) const {
  const Entry& info = entry(name);
  const auto dims = static_cast<int64_t>(info.shape.size());
  check(file_.kind(), dim >= 0 && dim < dims, file_.path(), ": tensor ", shown(name), " has ", dims,
        " dimensions; a slice of dimension ", dim, " was asked for");
  const int64_t extent = info.shape[static_cast<size_t>(dim)];
  check(file_.kind(), start >= 0 && length >= 0 && start <= extent && length <= extent - start,
        file_.path(), ": tensor ", shown(name), " has extent ", extent, " in dimension ", dim, "; ",
        length, " indices from ", start, " were asked for");

  std::vector<int64_t> shape = info.shape;
  shape[static_cast<size_t>(dim)] = length;
  at::Tensor result = at::empty(shape, at::TensorOptions(info.dtype));
  if (result.numel() == 0) {
    return result;
  }
  // shape [outer, extent, inner]: `outer` runs of length * inner elements
  const auto element = static_cast<uint64_t>(result.element_size());
  const auto position = info.shape.begin() + dim;
  const auto outer = std::accumulate(info.shape.begin(), position, uint64_t{1},
                                     std::multiplies<>());
  const auto inner = std::accumulate(position + 1, info.shape.end(), element, std::multiplies<>());
  const uint64_t run = static_cast<uint64_t>(length) * inner;
  auto* destination = static_cast<char*>(result.data_ptr());
  for (uint64_t i = 0; i < outer; ++i) {
    const uint64_t offset = (i * static_cast<uint64_t>(extent) + static_cast<uint64_t>(start)) *
                            inner;
    file_.read(info.offset + offset, destination + i * run, run);
  }
  return result;
}

FileDigest write_safetensors(const std::filesystem::path& path,
                             const std::vector<NamedTensor>& tensors,
                             const std::map<std::string, std::string>& metadata,
                             const FileCheck& accept) {
  // Wide elements first, then by name, as the reference implementation orders them: every tensor is
  // then aligned to its element.
  std::vector<const NamedTensor*> order;
  for (const NamedTensor& tensor : tensors) {
    order.push_back(&tensor);
  }
  std::sort(order.begin(), order.end(), [](const NamedTensor* a, const NamedTensor* b) {
    return std::pair(-static_cast<int64_t>(a->value.element_size()), std::string_view(a->name)) <
           std::pair(-static_cast<int64_t>(b->value.element_size()), std::string_view(b->name));
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) {
    header["__metadata__"] = metadata;
  }
  uint64_t end = 0;
  for (const NamedTensor* tensor : order) {
    const at::Tensor& value = tensor->value;
    const auto* dtype = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const auto& entry) {
      return entry.dtype == value.scalar_type();
    });
    check(ErrorKind::kInternal, dtype != kDtypes.end(), path, ": tensor ", shown(tensor->name),
          " has dtype ", c10::toString(value.scalar_type()),
          ", which safetensors files cannot hold");
    check(ErrorKind::kInternal, !header.contains(tensor->name), path, ": two tensors are named ",
          shown(tensor->name));
    const uint64_t begin = end;
    end += static_cast<uint64_t>(value.numel()) * static_cast<uint64_t>(value.element_size());
    header[tensor->name] = {
        {"dtype", dtype->text}, {"shape", value.sizes().vec()}, {"data_offsets", {begin, end}}};
  }
  std::string text = header.dump();
  text.append((kLengthBytes - text.size() % kLengthBytes) % kLengthBytes, ' ');

  FileWriter writer(path);
  const uint64_t header_bytes = text.size();
  writer.write(&header_bytes, kLengthBytes);
  writer.write(text);
  for (const NamedTensor* tensor : order) {
    const at::Tensor value = tensor->value.detach().to(at::kCPU).contiguous();
    writer.write(value.data_ptr(), static_cast<uint64_t>(value.nbytes()));
  }
  return writer.commit(accept);
}

}  // namespace drrl
