#include "core/io/file_io.h"

#include "core/io/file_watch.h"

#define XXH_INLINE_ALL
#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <iostream>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <xxhash.h>

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

bool same_file(const struct stat& a, const struct stat& b) {
  return a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

/// Where a file of some name is written.
struct Target {
  std::filesystem::path path;  // links followed
  bool replaced = true;        // false: it is written into as it is
  int descriptor = -1;         // stdout or stderr, when it is that
};

Target target_of(std::filesystem::path path) {
  check(ErrorKind::kStorage, path.has_filename(), "cannot write ", path,
        ": expected the name of a file");
  struct stat status{};
  if (::stat(path.c_str(), &status) == 0) {
    check(ErrorKind::kStorage, !S_ISDIR(status.st_mode), "cannot write ", path,
          ": it is a folder, expected a file");
    for (const int standard : {STDOUT_FILENO, STDERR_FILENO}) {
      struct stat open{};
      if (::fstat(standard, &open) == 0 && same_file(open, status)) {
        return {std::move(path), false, standard};
      }
    }
    if (!S_ISREG(status.st_mode)) {
      return {std::move(path), false};
    }
  } else {
    check(ErrorKind::kStorage, errno == ENOENT, "cannot write ", path, ": ", reason(errno));
  }
  std::error_code error;
  while (std::filesystem::is_symlink(
      std::filesystem::symlink_status(path, error))) {  // stat has found the end of the chain
    const auto to = std::filesystem::read_symlink(path, error);
    check(ErrorKind::kStorage, !error, "cannot follow the link ", path, ": ", error.message());
    path = path.parent_path() / to;
  }
  return {std::move(path)};
}

std::filesystem::path folder_of(const std::filesystem::path& file) {
  return file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
}

/// What the names of a file's temporaries begin with: random digits follow.
std::string temporary_prefix(const std::filesystem::path& path) {
  constexpr size_t kLongest = 200;  // names have at most 255 bytes
  return c10::str(".", path.filename().string().substr(0, kLongest), ".tmp-");
}

/// A new file beside `path`, locked as long as it is open: what is not locked has no writer any
/// more. Names are random: process numbers are the same on many hosts and in many containers.
std::pair<std::filesystem::path, int> open_temporary(const std::filesystem::path& path) {
  const auto folder = folder_of(path);
  while (true) {
    uint64_t random = 0;
    check(ErrorKind::kStorage, ::getrandom(&random, sizeof(random), 0) == sizeof(random),
          "no random numbers: ", reason(errno));
    auto temporary = folder / (temporary_prefix(path) + to_hex(random));
    const int descriptor = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor < 0 && errno == EEXIST) {
      continue;
    }
    check(ErrorKind::kStorage, descriptor >= 0, "cannot create a file in ", folder, ": ",
          reason(errno));
    struct stat status{};
    if (::flock(descriptor, LOCK_EX) != 0 || ::fstat(descriptor, &status) != 0 ||
        status.st_nlink > 0) {
      return {std::move(temporary),
              descriptor};  // a file system without locks: nobody takes it for a leftover either
    }
    ::close(descriptor);  // somebody took it for a leftover before it was locked
  }
}

/// Removes temporaries of `path` that no process writes any more.
void remove_leftovers(const std::filesystem::path& path) {
  const std::string prefix = temporary_prefix(path);
  std::vector<std::filesystem::path> found;
  std::error_code error;
  for (std::filesystem::directory_iterator item(folder_of(path), error), end; !error && item != end;
       item.increment(error)) {
    const std::string name = item->path().filename().string();
    if (name.starts_with(prefix) &&
        name.find_first_not_of("0123456789abcdef", prefix.size()) == std::string::npos) {
      found.push_back(item->path());
    }
  }
  for (const auto& leftover : found) {
    const int descriptor = ::open(leftover.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (descriptor >= 0) {
      if (::flock(descriptor, LOCK_EX | LOCK_NB) == 0) {
        ::unlink(leftover.c_str());
      }
      ::close(descriptor);
    }
  }
}

// XXH3-64 over a stream of pieces.
class StreamingChecksum {
 public:
  StreamingChecksum() : state_(XXH3_createState()) {
    check(ErrorKind::kInternal, state_ != nullptr && XXH3_64bits_reset(state_) == XXH_OK,
          "no memory for a checksum");
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

void watch_files(void (*hear)(const std::filesystem::path& file)) noexcept {
  file_watcher = hear;
}

FileReader::FileReader(std::filesystem::path path, ErrorKind kind)
    : path_(std::move(path)), kind_(kind) {
  touch(path_);
  // O_NONBLOCK: a named pipe must be refused below, not waited for.
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  check(kind_, descriptor_ >= 0, "cannot open ", path_, ": ", reason(errno));
  struct stat status{};
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
  check(kind_, offset <= size_ && bytes <= size_ - offset, path_, ": bytes ", offset, " to ",
        offset, " + ", bytes, " were asked for, but the file has ", size_, " bytes");
  char* target = static_cast<char*>(destination);
  while (bytes > 0) {
    touch(path_);
    const ssize_t got = ::pread(descriptor_, target, std::min(bytes, kLargestTransfer),
                                static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    check(kind_, got >= 0, "cannot read ", bytes, " bytes at offset ", offset, " of ", path_, ": ",
          reason(errno));
    check(kind_, got > 0, path_, " ends at byte ", offset, ": it had ", size_,
          " bytes when it was opened and was cut since");
    target += got;
    offset += static_cast<uint64_t>(got);
    bytes -= static_cast<uint64_t>(got);
  }
}

FileDigest FileReader::digest() const {
  return digest({{0, size_}});
}

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
  check(kind, std::filesystem::status_known(status), "cannot look at ", path, ": ",
        error.message());
  return std::filesystem::exists(status);
}

bool is_folder(const std::filesystem::path& path, ErrorKind kind) {
  std::error_code error;
  return path_exists(path, kind) && std::filesystem::is_directory(path, error);
}

std::string read_text(const std::filesystem::path& path, ErrorKind kind, uint64_t limit) {
  const FileReader file(path, kind);
  check(kind, file.size() <= limit, path, " has ", file.size(), " bytes; at most ", limit,
        " are expected of such a file");
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
      check(kind, ++depth <= kDeepest, where, " nests deeper than ", kDeepest, " levels at byte ",
            i);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
}

struct FileWriter::Checksum : StreamingChecksum {};

FileWriter::FileWriter(std::filesystem::path path) : checksum_(std::make_unique<Checksum>()) {
  Target target = target_of(std::move(path));
  path_ = std::move(target.path);
  touch(path_);
  if (target.replaced) {
    std::tie(temporary_, descriptor_) = open_temporary(path_);
  } else if (target.descriptor >= 0) {
    std::cout.flush();
    std::fflush(nullptr);  // what was printed comes first
    descriptor_ = ::fcntl(target.descriptor, F_DUPFD_CLOEXEC, 0);
    check(ErrorKind::kStorage, descriptor_ >= 0, "cannot write ", path_, ": ", reason(errno));
  } else {
    // O_NONBLOCK: a pipe that nobody reads must be refused, not waited for.
    descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    check(ErrorKind::kStorage, descriptor_ >= 0, "cannot write into ", path_, ": ",
          errno == ENXIO ? "nobody reads it" : reason(errno));
    ::fcntl(descriptor_, F_SETFL, ::fcntl(descriptor_, F_GETFL) & ~O_NONBLOCK);
  }
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

FileDigest FileWriter::commit(const FileCheck& accept) {
  touch(path_);
  if (temporary_.empty()) {
    const int closed = ::close(std::exchange(descriptor_, -1));
    check(ErrorKind::kStorage, closed == 0, "cannot write ", path_, " (close): ", reason(errno));
    return {bytes_, checksum_->value()};
  }
  // Delayed allocation and network file systems report a full disk only here, or at close.
  check(ErrorKind::kStorage, ::fsync(descriptor_) == 0, "cannot write ", path_, " (fsync of ",
        bytes_, " bytes): ", reason(errno));
  if (accept) {
    try {
      accept(temporary_);
    } catch (const Error& error) {
      std::string message = error.what();
      for (size_t at = 0; (at = message.find(temporary_.string(), at)) != std::string::npos;) {
        message.replace(at, temporary_.string().size(), path_.string());
      }
      raise(error.kind(), path_,
            " was not written: what reads such files would refuse it: ", message);
    }
  }
  // Renamed while it is open and locked: nobody takes it for a leftover.
  check(ErrorKind::kStorage, ::rename(temporary_.c_str(), path_.c_str()) == 0, "cannot rename ",
        temporary_, " to ", path_, ": ", reason(errno));
  temporary_.clear();
  const int closed = ::close(std::exchange(descriptor_, -1));
  check(ErrorKind::kStorage, closed == 0, "cannot write ", path_, " (close): ", reason(errno));
  sync_directory(folder_of(path_));
  remove_leftovers(path_);
  return {bytes_, checksum_->value()};
}

FileDigest write_text(const std::filesystem::path& path, std::string_view text,
                      const FileCheck& accept) {
  FileWriter writer(path);
  writer.write(text);
  return writer.commit(accept);
}

void check_writable(const std::filesystem::path& file) {
  const Target target = target_of(file);
  if (target.replaced) {
    const auto [temporary, descriptor] = open_temporary(target.path);
    ::unlink(temporary.c_str());
    ::close(descriptor);
  } else if (target.descriptor < 0) {  // not opened: a pipe's reader would see its end
    check(ErrorKind::kStorage, ::access(target.path.c_str(), W_OK) == 0, "cannot write into ",
          target.path, ": ", reason(errno));
  }
}

void check_writable_folder(const std::filesystem::path& folder) {
  std::filesystem::path
      at = std::filesystem::absolute(folder / "x").lexically_normal().parent_path();
  struct stat status{};
  while (::stat(at.c_str(), &status) != 0) {
    check(ErrorKind::kStorage, errno == ENOENT || errno == ENOTDIR, "cannot write into ", folder,
          ": ", at, ": ", reason(errno));
    check(ErrorKind::kStorage, ::lstat(at.c_str(), &status) != 0, "cannot write into ", folder,
          ": ", at, " is a link to nothing");
    at = at.parent_path();
  }
  check(ErrorKind::kStorage, S_ISDIR(status.st_mode), "cannot write into ", folder, ": ", at,
        " is not a folder");
  const auto [temporary, descriptor] = open_temporary(at / "probe");
  ::unlink(temporary.c_str());
  ::close(descriptor);
}

FolderLock::Descriptor::~Descriptor() {
  if (number >= 0) {
    ::close(number);
  }
}

FolderLock::FolderLock(const std::filesystem::path& folder, const std::string& flag,
                       const std::function<void(const std::string&)>& warn) {
  make_directories(folder);
  const auto path = folder / ".lock";
  // O_CLOEXEC: a program that this process starts must not hold the lock beyond its death.
  const int descriptor = ::open(path.c_str(),
                                O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
  check(ErrorKind::kStorage, descriptor >= 0, "cannot open ", path, ": ", reason(errno));
  descriptor_.number = descriptor;
  // A process that was just killed may still be on its way out.
  constexpr int kTries = 30;
  constexpr auto kPause = std::chrono::milliseconds(100);
  const auto lock = [&] { return ::flock(descriptor, LOCK_EX | LOCK_NB) == 0 ? 0 : errno; };
  int failed = lock();
  for (int i = 1; i < kTries && failed == EWOULDBLOCK; ++i) {
    std::this_thread::sleep_for(kPause);
    failed = lock();
  }
  if (failed == EWOULDBLOCK) {
    std::array<char, 400> text{};
    const ssize_t got = ::pread(descriptor, text.data(), text.size(), 0);
    std::string holder(text.data(), static_cast<size_t>(std::max<ssize_t>(got, 0)));
    holder.resize(std::min(holder.find('\n'), holder.size()));
    raise(ErrorKind::kStorage, folder, " is being written by another run, ", quoted(holder),
          ". Wait for its end, stop it, or name another folder by ", flag);
  }
  if (failed != 0) {
    warn(c10::str("the file system of ", folder, " takes no locks (", reason(failed),
                  "): see to it that no other run writes there"));
  }
  std::array<char, 256> host{};
  ::gethostname(host.data(), host.size() - 1);
  std::array<char, 40> since{};
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  std::strftime(since.data(), since.size(), "%Y-%m-%d %H:%M:%S UTC", ::gmtime_r(&now, &utc));
  const std::string holder = c10::str("process ", ::getpid(), " on ", host.data(), " since ",
                                      since.data(), "\n");
  check(ErrorKind::kStorage,
        ::ftruncate(descriptor, 0) == 0 && ::pwrite(descriptor, holder.data(), holder.size(), 0) ==
                                               static_cast<ssize_t>(holder.size()),
        "cannot write ", path, ": ", reason(errno));
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
  check(ErrorKind::kStorage, handle.descriptor >= 0, "cannot open folder ", directory, ": ",
        reason(errno));
  // Some network file systems refuse fsync on folders (EINVAL); their renames are synchronous.
  check(ErrorKind::kStorage, ::fsync(handle.descriptor) == 0 || errno == EINVAL,
        "cannot write folder ", directory, " (fsync): ", reason(errno));
}

void make_directories(const std::filesystem::path& directory) {
  const std::filesystem::path full = std::filesystem::absolute(directory).lexically_normal();
  std::error_code error;
  if (std::filesystem::is_directory(full, error)) {
    return;
  }
  const std::filesystem::path parent = full.has_filename() ? full.parent_path()
                                                           : full.parent_path().parent_path();
  if (parent != full) {
    make_directories(parent);
  }
  std::filesystem::create_directory(full, error);
  check(ErrorKind::kStorage, !error && std::filesystem::is_directory(full, error),
        "cannot create folder ", full, ": ", error.message());
  sync_directory(parent);
}

}  // namespace drrl
