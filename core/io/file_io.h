#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"

namespace drrl {

/// Size and XXH3-64 checksum of what was written or read.
struct FileDigest {
  uint64_t bytes = 0;
  uint64_t xxh3 = 0;
};

/// The checksum as it stands in manifests: 16 lower-case hexadecimal digits.
std::string to_hex(uint64_t checksum);

/// Text from a file that may be hostile, as it goes into messages: quoted, cut to 120 bytes,
/// everything unprintable escaped.
std::string quoted(const std::string& text);

/// Bytes [offset, offset + bytes) of a file.
struct FileRegion {
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

/// A file opened for reading at any offset. It reads with pread rather than through a mapping: a
/// file that shrinks, or a disk or network file system that fails, is then an Error and not a
/// SIGBUS, and pages are shared by the page cache either way.
class FileReader {
 public:
  /// `kind` is the kind of every Error about this file.
  FileReader(std::filesystem::path path, ErrorKind kind);
  FileReader(FileReader&& other) noexcept;
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;
  FileReader& operator=(FileReader&&) = delete;
  ~FileReader();

  const std::filesystem::path& path() const noexcept { return path_; }
  ErrorKind kind() const noexcept { return kind_; }
  uint64_t size() const noexcept { return size_; }  ///< bytes, when it was opened

  /// Exactly `bytes` bytes from `offset`, or an Error.
  void read(uint64_t offset, void* destination, uint64_t bytes) const;

  /// Size and checksum of the whole file.
  FileDigest digest() const;
  /// The same of these regions, one after the other.
  FileDigest digest(const std::vector<FileRegion>& regions) const;
  /// Size, and a checksum of all bytes of a file of at most 64 MiB, of 1024 pieces of a larger one:
  /// tells contents apart without reading them for long.
  FileDigest sample() const;

 private:
  std::filesystem::path path_;
  ErrorKind kind_;
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

/// `count` >= 2 pieces of `bytes` each, evenly spread over a region, its begin and end among them;
/// the region itself if it is not larger than all of them.
std::vector<FileRegion> pieces_of(FileRegion region, uint64_t count, uint64_t bytes);

/// Whether something is there, and whether it is a folder (links followed). Error(kind) when the
/// system cannot tell: permissions, loops of links, names that are too long.
bool path_exists(const std::filesystem::path& path, ErrorKind kind);
bool is_folder(const std::filesystem::path& path, ErrorKind kind);

/// The whole content of a file of at most `limit` bytes.
std::string read_text(const std::filesystem::path& path, ErrorKind kind,
                      uint64_t limit = uint64_t{64} << 20);

/// Throws Error(kind) that names `where` when JSON nests deeper than any file of ours or of Hugging
/// Face does: what comes after reading it, printing and copying, is recursive and would overflow
/// the stack.
void check_nesting(std::string_view json, const std::string& where, ErrorKind kind);

/// A reader's checks of the file with this path: an Error when it would be refused.
using FileCheck = std::function<void(const std::filesystem::path&)>;

/// Writes a file that is either complete or not there: into a hidden temporary in the same folder,
/// which `commit` makes durable (fsync) and renames. Without `commit` the temporary is removed;
/// those that killed writers of the same file left go, too. A link is followed. What is no regular
/// file (a device, a pipe, a socket) and the process's own stdout or stderr are not replaced but
/// written into, as they are. Errors: Error(kStorage) with path, operation and the system's reason.
class FileWriter {
 public:
  explicit FileWriter(std::filesystem::path path);
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;
  ~FileWriter();

  void write(const void* data, uint64_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }

  /// `accept` sees the complete file before it gets its name; what it throws is thrown, about
  /// `path`, and nothing is replaced.
  FileDigest commit(const FileCheck& accept = {});

 private:
  struct Checksum;

  std::filesystem::path path_;       // links followed
  std::filesystem::path temporary_;  // empty: written into path_ itself
  int descriptor_ = -1;
  uint64_t bytes_ = 0;
  std::unique_ptr<Checksum> checksum_;
};

/// Writes `text` atomically.
FileDigest write_text(const std::filesystem::path& path, std::string_view text,
                      const FileCheck& accept = {});

/// Error(kStorage) unless FileWriter can begin to write this file, or files in this folder, which
/// need not be there yet. Nothing is changed or left behind.
void check_writable(const std::filesystem::path& file);
void check_writable_folder(const std::filesystem::path& folder);

/// The right to write into a folder, held until it is destroyed or its process dies, however it
/// dies: a lock (flock) on the folder's file ".lock", in which stands who holds it. That the file
/// is there means nothing.
class FolderLock {
 public:
  /// Makes the folder if need be. Error(kStorage) if another process holds the lock, also on
  /// another host where the file system takes locks, naming it and what can be done; `flag` is the
  /// option that named the folder. Where the file system takes none, there is no protection, and
  /// `warn` hears of it.
  FolderLock(const std::filesystem::path& folder, const std::string& flag,
             const std::function<void(const std::string&)>& warn);
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  struct Descriptor {
    ~Descriptor();
    int number = -1;
  };
  Descriptor descriptor_;
};

/// Copies a file of any size, atomically.
FileDigest copy_file(const FileReader& from, const std::filesystem::path& to);

/// Makes creations, renames and removals inside `directory` durable.
void sync_directory(const std::filesystem::path& directory);

/// `create_directories`, durable, as Error(kStorage).
void make_directories(const std::filesystem::path& directory);

}  // namespace drrl
