#pragma once

#include <utility>

#include "core/io/safetensors.h"

namespace drrl {

/// The weights of a Hugging Face model directory: `model.safetensors`, or the shards that
/// `model.safetensors.index.json` lists. Errors: Error(kModel).
class WeightStore {
 public:
  static WeightStore open(const std::filesystem::path& directory);

  const std::filesystem::path& path() const {
    return path_;
  }  ///< of the only file, or of the index of several
  std::vector<std::string> names() const;  ///< sorted
  bool contains(const std::string& name) const { return owner_.contains(name); }
  const std::vector<int64_t>& shape(const std::string& name) const;
  at::ScalarType dtype(const std::string& name) const;

  /// Owned, contiguous CPU tensors converted to `dtype`.
  at::Tensor tensor(const std::string& name, at::ScalarType dtype = at::kFloat) const;
  at::Tensor slice(const std::string& name, int64_t dim, int64_t start, int64_t length,
                   at::ScalarType dtype = at::kFloat) const;

  /// Of all files: their size, and a checksum of what SafetensorsFile::sample looks at.
  FileDigest sample() const;

 private:
  WeightStore() = default;
  const SafetensorsFile& file_of(const std::string& name) const;

  std::filesystem::path path_;  // model.safetensors, or the index of several files
  std::vector<SafetensorsFile> files_;
  std::map<std::string, size_t> owner_;  // tensor name -> index in files_
};

}  // namespace drrl
