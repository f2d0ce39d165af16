#include "models/causal_lm/weight_store.h"

#include <nlohmann/json.hpp>

#include "distributed/collectives/agreement.h"

namespace drrl {
namespace {

using Json = nlohmann::json;

bool is_plain_file_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

}  // namespace

WeightStore WeightStore::open(const std::filesystem::path& directory) {
  constexpr ErrorKind kind = ErrorKind::kModel;
  check(kind, is_folder(directory, kind), directory,
        " is not a folder; expected a Hugging Face model directory");
  WeightStore store;
  const auto adopt = [&](const std::filesystem::path& path) -> SafetensorsFile& {
    return store.files_.emplace_back(path, kind);
  };

  const std::filesystem::path single = directory / "model.safetensors";
  const std::filesystem::path index = directory / "model.safetensors.index.json";
  if (path_exists(single, kind)) {
    store.path_ = single;
    for (const auto& [name, entry] : adopt(single).entries()) {
      store.owner_.emplace(name, 0);
    }
    return store;
  }
  if (!path_exists(index, kind)) {
    const bool pickled = path_exists(directory / "pytorch_model.bin", kind) ||
                         path_exists(directory / "pytorch_model.bin.index.json", kind);
    raise(kind, directory, " has neither model.safetensors nor model.safetensors.index.json",
          pickled ? "; its pytorch_model.bin is a pickle, which is not read: convert it with "
                    "save_pretrained(safe_serialization=True)"
                  : "");
  }

  store.path_ = index;
  const std::string text = read_text(index, kind);
  check_nesting(text, index.string(), kind);
  Json listing;
  try {
    listing = Json::parse(text);
  } catch (const Json::exception& error) {
    raise(kind, index, " is not valid JSON: ", error.what());
  }
  const bool has_map = listing.is_object() && listing.contains("weight_map") &&
                       listing["weight_map"].is_object();
  check(kind, has_map && !listing["weight_map"].empty(), index,
        " has no \"weight_map\" object that lists tensors and files");
  std::map<std::string, size_t> numbers;
  for (const auto& [name, value] : listing["weight_map"].items()) {
    check(kind, value.is_string() && is_plain_file_name(value.get<std::string>()), index,
          ": tensor ", quoted(name), " is in ",
          quoted(value.dump(-1, ' ', true, Json::error_handler_t::replace)),
          ", which is not the name of a file in the same folder");
    const auto file = value.get<std::string>();
    const auto [position, fresh] = numbers.emplace(file, store.files_.size());
    if (fresh) {
      check(kind, path_exists(directory / file, kind), index, " says that tensor ", quoted(name),
            " is in ", quoted(file), ", but there is no such file");
      adopt(directory / file);
    }
    check(kind, store.files_[position->second].contains(name), index, " says that tensor ",
          quoted(name), " is in ", quoted(file), ", but it is not there");
    store.owner_.emplace(name, position->second);
  }
  // A tensor that the index leaves out, or has in another file, might be the one that is meant.
  for (const auto& [file, number] : numbers) {
    for (const auto& [name, entry] : store.files_[number].entries()) {
      const auto owner = store.owner_.find(name);
      check(kind, owner != store.owner_.end() && owner->second == number, index, ": tensor ",
            quoted(name), " of ", quoted(file), " is ",
            owner == store.owner_.end() ? "not listed" : "listed as that of another file");
    }
  }
  return store;
}

std::vector<std::string> WeightStore::names() const {
  std::vector<std::string> result;
  for (const auto& [name, file] : owner_) {
    result.push_back(name);
  }
  return result;
}

const SafetensorsFile& WeightStore::file_of(const std::string& name) const {
  const auto found = owner_.find(name);
  check(ErrorKind::kModel, found != owner_.end(), path_, " has no tensor ", quoted(name),
        " (it has ", owner_.size(), " others)");
  return files_[found->second];
}

const std::vector<int64_t>& WeightStore::shape(const std::string& name) const {
  return file_of(name).entry(name).shape;
}

at::ScalarType WeightStore::dtype(const std::string& name) const {
  return file_of(name).entry(name).dtype;
}

at::Tensor WeightStore::tensor(const std::string& name, at::ScalarType dtype) const {
  return file_of(name).tensor(name).to(dtype);
}

at::Tensor WeightStore::slice(const std::string& name, int64_t dim, int64_t start, int64_t length,
                              at::ScalarType dtype) const {
  return file_of(name).slice(name, dim, start, length).to(dtype);
}

FileDigest WeightStore::sample() const {
  uint64_t bytes = 0;
  std::string checksums;
  for (const SafetensorsFile& file : files_) {
    const FileDigest of_file = file.sample();
    bytes += of_file.bytes;
    checksums += to_hex(of_file.xxh3);
  }
  return {bytes, hash_bytes(checksums)};
}

}  // namespace drrl
