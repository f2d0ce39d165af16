#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "core/io/safetensors.h"

namespace drrl {

/// A safetensors file of this folder (calibrations, traces, agents) with checked reads. Errors of
/// everything: Error(kModel) that names the file, the field or tensor, what it is and what was
/// expected.
class PolicyFile {
 public:
  /// `what` names the kind of file in messages; `format` is what its metadata must say.
  PolicyFile(const std::filesystem::path& path, const char* what, const char* format);

  const std::string& field(const std::string& name) const;
  int64_t integer(const std::string& name, int64_t least) const;
  /// The field "ranks": ascending, from 1.
  std::vector<int64_t> ranks() const;
  /// Of this dtype and number of dimensions, not empty, finite.
  at::Tensor tensor(const std::string& name, at::ScalarType dtype, int64_t dims) const;
  bool contains(const std::string& name) const { return file_.contains(name); }

 private:
  SafetensorsFile file_;
  const char* what_;
};

/// "16,32,48", as PolicyFile::ranks reads it.
std::string to_list(const std::vector<int64_t>& ranks);

}  // namespace drrl
