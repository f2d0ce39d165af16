#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "core/error.h"
#include "core/io/file_io.h"

namespace drrl {

/// One file in the safetensors format: u64 header length, JSON header {name: {dtype, shape,
/// data_offsets}}, data. Opening checks the header completely, so that whatever it contains, every
/// later read lies inside the file: lengths, duplicate names, dtypes, shape x dtype = bytes
/// (without overflow), offsets inside the data, no overlaps, no holes. Offsets need not be aligned.
/// Source: github.com/huggingface/safetensors. Errors: Error(kind) that names the file, the tensor,
/// the value and what was expected.
class SafetensorsFile {
 public:
  struct Entry {
    at::ScalarType dtype;
    std::vector<int64_t> shape;
    uint64_t offset;  ///< of the first byte, from the start of the file
    uint64_t bytes;
  };

  explicit SafetensorsFile(const std::filesystem::path& path, ErrorKind kind = ErrorKind::kModel);

  const std::filesystem::path& path() const noexcept { return file_.path(); }
  const std::map<std::string, Entry>& entries() const noexcept { return entries_; }
  const std::map<std::string, std::string>& metadata() const noexcept { return metadata_; }
  bool contains(const std::string& name) const { return entries_.contains(name); }
  const Entry& entry(const std::string& name) const;

  /// The tensor in the dtype of the file: owned, contiguous, CPU.
  at::Tensor tensor(const std::string& name) const;

  /// Indices [start, start + length) of dimension `dim`; nothing else is read. Owned, contiguous,
  /// CPU.
  at::Tensor slice(const std::string& name, int64_t dim, int64_t start, int64_t length) const;

  /// Size of the file, and a checksum of its header and of a few pieces of every tensor: tells
  /// models apart without reading them.
  FileDigest sample() const;

 private:
  FileReader file_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

struct NamedTensor {
  std::string name;
  at::Tensor value;  ///< any device and strides
};

/// Writes a safetensors file that is either complete and durable or not there (FileWriter, also
/// about `accept`). Names must be distinct. Errors: Error(kStorage) when the file system refuses;
/// Error(kInternal) on a duplicate name or a dtype that the format lacks.
FileDigest write_safetensors(const std::filesystem::path& path,
                             const std::vector<NamedTensor>& tensors,
                             const std::map<std::string, std::string>& metadata = {{"format",
                                                                                    "pt"}},
                             const FileCheck& accept = {});

}  // namespace drrl
