#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/io/safetensors.h"
#include "distributed/collectives/agreement.h"

namespace drrl {

/// Atomic checkpoint folders. Layout under `root`:
///   step-00000120/             complete, never changed again
///     manifest.json            step, number of the save among all of the root, world size, and
///                              size + XXH3 checksum of every file; written last, protected by a
///                              checksum of its own
///     the files that the ranks wrote
///   latest                     one line, "step-00000120", replaced atomically
///   .tmp-*                     never looked at by a reader; removed by the next save
///
/// Every rank constructs one writer (collective), writes its own files (not collective), then
/// commits (collective). The folder appears under its final name only when every byte of every rank
/// is on the disk and in the manifest.
///
/// A failed write does not throw where it happens but in `commit`, on every rank, naming the rank
/// and the reason: so no rank is left waiting in a collective, and all of them leave by the same
/// error, Error(kStorage). The previous checkpoint and `latest` are then untouched.
class CheckpointWriter {
 public:
  /// Makes the temporary folder. `root` must be one shared folder; it is created. Step >= 0. With
  /// one rank no exchange is needed.
  CheckpointWriter(std::filesystem::path root, int64_t step, int64_t world_rank = 0,
                   int64_t world_size = 1, TextExchange exchange = {});
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;
  ~CheckpointWriter();

  /// File names: letters, digits, '.', '_' and '-', not starting with '.', unlike those of other
  /// ranks, and not "manifest.json". Error(kInternal) otherwise.
  void write_tensors(const std::string& file, const std::vector<NamedTensor>& tensors,
                     const std::map<std::string, std::string>& metadata = {});
  void write_text(const std::string& file, std::string_view text);

  /// Publishes the checkpoint, points `latest` to it and removes all but the newest `keep_last` (0:
  /// keep all). An earlier checkpoint of the same step is replaced. Returns the folder.
  std::filesystem::path commit(int64_t keep_last = 0);

 private:
  struct Written {
    std::string file;
    FileDigest digest;
  };

  void record(const std::string& file,
              const std::function<FileDigest(const std::filesystem::path&)>& write);
  void publish(const std::vector<std::string>& reports, int64_t keep_last);
  void prune(int64_t keep_last) const;

  std::filesystem::path root_;
  int64_t step_;
  int64_t world_rank_;
  int64_t world_size_;
  TextExchange exchange_;
  std::filesystem::path temporary_;
  std::vector<Written> written_;
  std::string failure_;  // of this rank, empty if none
};

/// A checkpoint that was verified. Errors: Error(kCheckpoint) that says which file is wrong, and
/// how.
class CheckpointReader {
  friend class CheckpointWriter;

 public:
  struct Options {
    /// true: `open` reads and checks every file. false: only sizes; a file's checksum is checked
    /// when it is first used, so that each of many ranks reads only its own.
    bool verify_all = true;
    /// When `open` is given a root whose newest checkpoint, or the one that `latest` names, is
    /// damaged or missing: take the newest sound one instead. What was wrong is passed to
    /// `on_fallback`, one sentence a checkpoint. Not set: throw.
    std::function<void(const std::string&)> on_fallback;
  };

  /// `path`: a checkpoint folder, or a root: then the newest one in it, which is the one saved
  /// last, whatever its step. `latest` is behind after a death between the two renames of a save.
  /// Ranks of one run should open the folder that rank 0 found, so that all of them agree.
  static CheckpointReader open(const std::filesystem::path& path, const Options& options);
  static CheckpointReader open(const std::filesystem::path& path) { return open(path, Options()); }

  /// Whether something was saved in `root`, sound or not: a file `latest`, or a folder with the
  /// name of a checkpoint.
  static bool any(const std::filesystem::path& root);

  /// The folder that `latest` of `root` names; none if there is no such file.
  static std::optional<std::filesystem::path> latest(const std::filesystem::path& root);

  const std::filesystem::path& directory() const noexcept { return directory_; }
  int64_t step() const noexcept { return step_; }
  /// Of the format.
  int version() const noexcept { return version_; }
  int64_t world_size() const noexcept { return world_size_; }
  /// That of the manifest, and with it of every file.
  const std::string& checksum() const noexcept { return checksum_; }
  std::vector<std::string> files() const;
  bool contains(const std::string& file) const { return files_.contains(file); }

  SafetensorsFile tensors(const std::string& file) const;
  std::string text(const std::string& file) const;

 private:
  explicit CheckpointReader(std::filesystem::path directory) : directory_(std::move(directory)) {}
  static CheckpointReader open_directory(const std::filesystem::path& directory, bool verify_all);
  void verify(const std::string& file) const;

  std::filesystem::path directory_;
  int64_t step_ = 0;
  int version_ = 0;
  int64_t world_size_ = 0;
  std::string checksum_;
  std::map<std::string, FileDigest> files_;
  mutable std::map<std::string, bool> verified_;
};

}  // namespace drrl
