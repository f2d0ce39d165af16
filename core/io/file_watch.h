#pragma once

#include <filesystem>

namespace drrl {

/// From now on `hear` is told of every file before it is opened and before each piece of it is read
/// or written; null: nobody is. So whoever watches this process sees that it makes headway, and
/// where it stands when a file system does not answer. Called from any thread; it must not throw.
void watch_files(void (*hear)(const std::filesystem::path& file)) noexcept;

}  // namespace drrl
