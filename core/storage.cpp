#include "core/storage.h"

#include "core/file_watch.h"

#define XXH_INLINE_ALL
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

namespace drrl {
namespace {

constexpr uint64_t kChunk = uint64_t{8} << 20;

// Of one call: so that also a slow file system gives signs of life.
constexpr uint64_t kLargestTransfer = uint64_t{16} << 20;

std::atomic<void (*)(const std::filesystem::path&)> file_watcher{nullptr};

void touch(const std::filesystem::path& file) {
  if (auto* const hear = file_watcher.load()) {
    hear(file);
  }
}

std::string reason(int error_number) {
  return std::string(std::strerror(error_number));
}

struct OpenDirectory {
  explicit OpenDirectory(const std::filesystem::path& path)
      : descriptor(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {}
  OpenDirectory(const OpenDirectory&) = delete;
  OpenDirectory& operator=(const OpenDirectory&) = delete;
  ~OpenDirectory() {
    if (descriptor >= 0) {
      ::close(descriptor);
    }
  }
  int descriptor;
};

// XXH3-64 over a stream of pieces.
class StreamingChecksum {
 public:
  StreamingChecksum() : state_(XXH3_createState()) {
    check(ErrorKind::kInternal, state_ != nullptr && XXH3_64bits_reset(state_) == XXH_OK, "no memory for a checksum");
  }
  StreamingChecksum(const StreamingChecksum&) = delete;
  StreamingChecksum& operator=(const StreamingChecksum&) = delete;
  ~StreamingChecksum() { XXH3_freeState(state_); }

  void update(const void* data, uint64_t bytes) { XXH3_64bits_update(state_, data, bytes); }
  uint64_t value() const { return XXH3_64bits_digest(state_); }

 private:
  XXH3_state_t* state_;
};

}  // namespace

std::string quoted(const std::string& text) {
  constexpr size_t kLongest = 120;
  constexpr char kDigits[] = "0123456789abcdef";
  std::string result = "\"";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte > 0x7e) {
      result += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    } else {
      result += c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c};
    }
  }
  return result + (text.size() > kLongest ? "...\"" : "\"");
}

std::string to_hex(uint64_t checksum) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text(16, '0');
  for (int i = 15; i >= 0; --i, checksum >>= 4) {
    text[static_cast<size_t>(i)] = kDigits[checksum & 15];
  }
  return text;
}

void watch_files(void (*hear)(const std::filesystem::path& file)) noexcept { file_watcher = hear; }

FileReader::FileReader(std::filesystem::path path, ErrorKind kind) : path_(std::move(path)), kind_(kind) {
  touch(path_);
  // O_NONBLOCK: a named pipe must be refused below, not waited for.
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  check(kind_, descriptor_ >= 0, "cannot open ", path_, ": ", reason(errno));
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor_);
    raise(kind_, "cannot read ", path_, ": it is not a regular file");
  }
  size_ = static_cast<uint64_t>(status.st_size);
}

FileReader::FileReader(FileReader&& other) noexcept
    : path_(std::move(other.path_)),
      kind_(other.kind_),
      descriptor_(std::exchange(other.descriptor_, -1)),
      size_(other.size_) {}

FileReader::~FileReader() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
  }
}

void FileReader::read(uint64_t offset, void* destination, uint64_t bytes) const {
  check(kind_, offset <= size_ && bytes <= size_ - offset, path_, ": bytes ", offset, " to ", offset, " + ", bytes,
        " were asked for, but the file has ", size_, " bytes");
  char* target = static_cast<char*>(destination);
  while (bytes > 0) {
    touch(path_);
    const ssize_t got = ::pread(descriptor_, target, std::min(bytes, kLargestTransfer), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    check(kind_, got >= 0, "cannot read ", bytes, " bytes at offset ", offset, " of ", path_, ": ", reason(errno));
    check(kind_, got > 0, path_, " ends at byte ", offset, ": it had ", size_, " bytes when it was opened and was cut since");
    target += got;
    offset += static_cast<uint64_t>(got);
    bytes -= static_cast<uint64_t>(got);
  }
}

FileDigest FileReader::digest() const { return digest({{0, size_}}); }

FileDigest FileReader::digest(const std::vector<FileRegion>& regions) const {
  StreamingChecksum checksum;
  std::vector<char> buffer(std::min(kChunk, size_));
  uint64_t total = 0;
  for (const FileRegion& region : regions) {
    for (uint64_t done = 0; done < region.bytes; done += buffer.size()) {
      const uint64_t bytes = std::min<uint64_t>(buffer.size(), region.bytes - done);
      read(region.offset + done, buffer.data(), bytes);
      checksum.update(buffer.data(), bytes);
    }
    total += region.bytes;
  }
  return {total, checksum.value()};
}

FileDigest FileReader::sample() const {
  return {size_, digest(pieces_of({0, size_}, /*count=*/1024, /*bytes=*/uint64_t{64} << 10)).xxh3};
}

std::vector<FileRegion> pieces_of(FileRegion region, uint64_t count, uint64_t bytes) {
  if (region.bytes <= count * bytes) {
    return {region};
  }
  std::vector<FileRegion> pieces;
  const uint64_t step = (region.bytes - bytes) / (count - 1);
  for (uint64_t i = 0; i + 1 < count; ++i) {
    pieces.push_back({region.offset + i * step, bytes});
  }
  pieces.push_back({region.offset + region.bytes - bytes, bytes});
  return pieces;
}

bool path_exists(const std::filesystem::path& path, ErrorKind kind) {
  touch(path);
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  check(kind, std::filesystem::status_known(status), "cannot look at ", path, ": ", error.message());
  return std::filesystem::exists(status);
}

bool is_folder(const std::filesystem::path& path, ErrorKind kind) {
  std::error_code error;
  return path_exists(path, kind) && std::filesystem::is_directory(path, error);
}

std::string read_text(const std::filesystem::path& path, ErrorKind kind, uint64_t limit) {
  const FileReader file(path, kind);
  check(kind, file.size() <= limit, path, " has ", file.size(), " bytes; at most ", limit, " are expected of such a file");
  std::string text(file.size(), '\0');
  file.read(0, text.data(), text.size());
  return text;
}

void check_nesting(std::string_view json, const std::string& where, ErrorKind kind) {
  constexpr int64_t kDeepest = 64;
  int64_t depth = 0;
  bool inside = false;  // of a string
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (c == '"') {
      inside = !inside;
    } else if (inside) {
      i += c == '\\' ? 1 : 0;
    } else if (c == '[' || c == '{') {
      check(kind, ++depth <= kDeepest, where, " nests deeper than ", kDeepest, " levels at byte ", i);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
}

struct FileWriter::Checksum : StreamingChecksum {};

FileWriter::FileWriter(std::filesystem::path path)
    : path_(std::move(path)),
      temporary_(path_.parent_path() / c10::str(".", path_.filename().string(), ".tmp-", ::getpid())),
      checksum_(std::make_unique<Checksum>()) {
  touch(temporary_);
  ::unlink(temporary_.c_str());  // of an earlier process with this number
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  check(ErrorKind::kStorage, descriptor_ >= 0, "cannot create ", temporary_, ": ", reason(errno));
}

FileWriter::~FileWriter() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
  }
  if (!temporary_.empty()) {
    ::unlink(temporary_.c_str());
  }
}

void FileWriter::write(const void* data, uint64_t bytes) {
  const char* source = static_cast<const char*>(data);
  checksum_->update(source, bytes);
  while (bytes > 0) {
    touch(path_);
    const ssize_t put = ::write(descriptor_, source, std::min(bytes, kLargestTransfer));
    if (put < 0 && errno == EINTR) {
      continue;
    }
    check(ErrorKind::kStorage, put > 0, "cannot write ", path_, " after ", bytes_,
          " bytes: ", reason(put < 0 ? errno : ENOSPC));
    source += put;
    bytes_ += static_cast<uint64_t>(put);
    bytes -= static_cast<uint64_t>(put);
  }
}

FileDigest FileWriter::commit() {
  touch(path_);
  // Delayed allocation and network file systems report a full disk only here, or at close.
  check(ErrorKind::kStorage, ::fsync(descriptor_) == 0, "cannot write ", path_, " (fsync of ", bytes_,
        " bytes): ", reason(errno));
  const int closed = ::close(std::exchange(descriptor_, -1));
  check(ErrorKind::kStorage, closed == 0, "cannot write ", path_, " (close): ", reason(errno));
  check(ErrorKind::kStorage, ::rename(temporary_.c_str(), path_.c_str()) == 0, "cannot rename ", temporary_, " to ", path_,
        ": ", reason(errno));
  temporary_.clear();
  sync_directory(path_.parent_path());
  return {bytes_, checksum_->value()};
}

FileDigest write_text(const std::filesystem::path& path, std::string_view text) {
  FileWriter writer(path);
  writer.write(text);
  return writer.commit();
}

FileDigest copy_file(const FileReader& from, const std::filesystem::path& to) {
  FileWriter writer(to);
  std::vector<char> buffer(std::min(kChunk, from.size()));
  for (uint64_t offset = 0; offset < from.size(); offset += buffer.size()) {
    const uint64_t bytes = std::min<uint64_t>(buffer.size(), from.size() - offset);
    from.read(offset, buffer.data(), bytes);
    writer.write(buffer.data(), bytes);
  }
  return writer.commit();
}

void sync_directory(const std::filesystem::path& directory) {
  touch(directory);
  const OpenDirectory handle(directory.empty() ? std::filesystem::path(".") : directory);
  check(ErrorKind::kStorage, handle.descriptor >= 0, "cannot open folder ", directory, ": ", reason(errno));
  // Some network file systems refuse fsync on folders (EINVAL); their renames are synchronous.
  check(ErrorKind::kStorage, ::fsync(handle.descriptor) == 0 || errno == EINVAL, "cannot write folder ", directory,
        " (fsync): ", reason(errno));
}

void make_directories(const std::filesystem::path& directory) {
  const std::filesystem::path full = std::filesystem::absolute(directory).lexically_normal();
  std::error_code error;
  if (std::filesystem::is_directory(full, error)) {
    return;
  }
  const std::filesystem::path parent = full.has_filename() ? full.parent_path() : full.parent_path().parent_path();
  if (parent != full) {
    make_directories(parent);
  }
  std::filesystem::create_directory(full, error);
  check(ErrorKind::kStorage, !error && std::filesystem::is_directory(full, error), "cannot create folder ", full, ": ",
        error.message());
  sync_directory(parent);
}

}  // namespace drrl
