#pragma once

#include <unistd.h>

#include <filesystem>
#include <string>

namespace drrl {

/// A file of this process's own, in a folder for temporary files.
inline std::filesystem::path temporary(const std::string& name) {
  const auto folder = std::filesystem::temp_directory_path() /
                      ("drrl_test_" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  return folder / name;
}

}  // namespace drrl
