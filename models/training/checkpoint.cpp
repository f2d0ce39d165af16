#include "models/training/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include <nlohmann/json.hpp>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace drrl {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
constexpr ErrorKind kKind = ErrorKind::kCheckpoint;
constexpr const char* kManifest = "manifest.json";
constexpr const char* kLatest = "latest";
constexpr const char* kFormat = "drrl-checkpoint";
constexpr int kVersion = 2;  // 1: states of observers in one file
constexpr std::string_view kTemporaryPrefix = ".tmp-";

std::string folder_name(int64_t step) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "step-%08lld", static_cast<long long>(step));
  return text.data();
}

// The step of a checkpoint folder's name; none if it is not one.
std::optional<int64_t> step_of(const std::string& name) {
  constexpr std::string_view kPrefix = "step-";
  constexpr size_t kMostDigits = 18;  // fits int64
  if (!name.starts_with(kPrefix) || name.size() > kPrefix.size() + kMostDigits) {
    return std::nullopt;
  }
  const std::string digits = name.substr(kPrefix.size());
  if (digits.size() < 8 || digits.find_first_not_of("0123456789") != std::string::npos) {
    return std::nullopt;
  }
  const int64_t step = std::stoll(digits);
  return folder_name(step) == name ? std::optional(step) : std::nullopt;
}

bool is_file_name(const std::string& name) {
  constexpr const char*
      kAllowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
  return !name.empty() && name.size() <= 200 && name.front() != '.' &&
         name.find_first_not_of(kAllowed) == std::string::npos && name != kManifest;
}

// The steps of the checkpoint folders in `root`, the highest first. No folder: none.
std::vector<int64_t> steps_in(const fs::path& root) {
  std::vector<int64_t> steps;
  std::error_code error;
  for (fs::directory_iterator item(root, error), end; !error && item != end;
       item.increment(error)) {
    if (const auto step = step_of(item->path().filename().string())) {
      steps.push_back(*step);
    }
  }
  check(kKind, !error || error == std::errc::no_such_file_or_directory, "cannot list ", root, ": ",
        error.message());
  std::sort(steps.rbegin(), steps.rend());
  return steps;
}

// The manifest protects itself with a checksum over everything else in it.
std::string self_checksum(Json manifest) {
  manifest.erase("manifest_xxh3");
  const std::string text = manifest.dump();
  return to_hex(XXH3_64bits(text.data(), text.size()));
}

// The manifest of a checkpoint folder: of a version that is known, and undamaged.
Json read_manifest(const fs::path& directory) {
  const fs::path path = directory / kManifest;
  check(kKind, is_folder(directory, kKind), directory, " does not exist");
  check(kKind, path_exists(path, kKind), directory, " has no ", kManifest,
        ": it is not a complete checkpoint");
  try {
    const std::string text = read_text(path, kKind);
    check_nesting(text, path.string(), kKind);
    const Json manifest = Json::parse(text);
    check(kKind, manifest.is_object() && manifest.value("format", "") == kFormat, path,
          " is not the manifest of a drrl checkpoint");
    const int version = manifest.value("version", 0);
    check(kKind, version == 1 || version == kVersion, path, " has version ", version,
          "; versions 1 to ", kVersion, " are supported");
    const auto stated = manifest.at("manifest_xxh3").get<std::string>();
    const std::string actual = self_checksum(manifest);
    check(kKind, stated == actual, path, " is damaged: its checksum is ", actual, ", and it says ",
          stated);
    return manifest;
  } catch (const Json::exception& error) {
    raise(kKind, path, " is damaged: ", error.what());
  }
}

// A checkpoint folder, and the how many-th save of its root it is: steps begin again when a run
// goes back, saves do not. 0: of a version that did not count; -1: its manifest cannot be read.
struct Saved {
  int64_t save;
  bool is_latest;  // named by the file "latest", which counts among those of the same save
  int64_t step;
  auto operator<=>(const Saved&) const = default;
};

// All in `root`, the last one saved first.
std::vector<Saved> saved_in(const fs::path& root, const std::optional<fs::path>& latest = {}) {
  std::vector<Saved> all;
  for (const int64_t step : steps_in(root)) {
    const fs::path folder = root / folder_name(step);
    int64_t save = -1;
    try {
      save = read_manifest(folder).value("save", int64_t{0});
    } catch (const std::exception&) {
      // whoever opens it hears why
    }
    all.push_back({save, folder == latest, step});
  }
  std::sort(all.rbegin(), all.rend());
  return all;
}

// Puts the folder `from` in the place of `to`. An older folder there is swapped out in one step, so
// that a complete one is there at any time.
void replace_folder(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) == 0) {
    return;
  }
  int error = errno;
  if (error == ENOTEMPTY || error == EEXIST) {
    if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) == 0) {
      return;  // the older one now has the temporary name
    }
    // A file system without the exchange: move the older one aside first.
    const fs::path aside = from.string() + "-old";
    if (::rename(to.c_str(), aside.c_str()) == 0 && ::rename(from.c_str(), to.c_str()) == 0) {
      return;
    }
    error = errno;
  }
  raise(ErrorKind::kStorage, "cannot rename ", from, " to ", to, ": ", std::strerror(error));
}

void remove_quietly(const fs::path& path) {
  std::error_code error;
  fs::remove_all(path, error);
}

// A failure of a caller's callback or of the library itself as text, for the other ranks.
template <typename Action>
std::string failure_of(const Action& action) {
  try {
    action();
    return {};
  } catch (const std::exception& error) {
    return error.what()[0] == '\0' ? "unknown error" : error.what();
  }
}

}  // namespace

CheckpointWriter::CheckpointWriter(fs::path root, int64_t step, int64_t world_rank,
                                   int64_t world_size, TextExchange exchange)
    : root_(std::move(root)),
      step_(step),
      world_rank_(world_rank),
      world_size_(world_size),
      exchange_(std::move(exchange)) {
  check(ErrorKind::kInternal,
        step >= 0 && step < 1'000'000'000'000'000'000 && world_size >= 1 && world_rank >= 0 &&
            world_rank < world_size,
        "checkpoint of step ", step, " by rank ", world_rank, " of ", world_size);
  check(ErrorKind::kInternal, exchange_ != nullptr || world_size == 1, "a checkpoint by ",
        world_size, " ranks needs an exchange");
  if (!exchange_) {
    exchange_ = [](const std::string& mine) { return std::vector<std::string>{mine}; };
  }
  temporary_ = root_ / (std::string(kTemporaryPrefix) + folder_name(step_));

  std::string failure;
  if (world_rank_ == 0) {
    failure = failure_of([&] {
      make_directories(root_);
      fs::remove_all(temporary_);  // half-written by a run that died
      make_directories(temporary_);
    });
  }
  // All ranks wait here for the folder, and leave together if there is none.
  const std::string of_rank_0 = exchange_(failure).front();
  check(ErrorKind::kStorage, of_rank_0.empty(), "cannot begin checkpoint ",
        root_ / folder_name(step_), ": ", of_rank_0);
}

CheckpointWriter::~CheckpointWriter() {
  if (world_rank_ == 0 && !temporary_.empty()) {
    remove_quietly(temporary_);
  }
}

void CheckpointWriter::record(const std::string& file,
                              const std::function<FileDigest(const fs::path&)>& write) {
  check(ErrorKind::kInternal, is_file_name(file), "\"", file,
        "\" cannot be the name of a file in a checkpoint");
  check(ErrorKind::kInternal,
        std::none_of(written_.begin(), written_.end(),
                     [&](const Written& other) { return other.file == file; }),
        "\"", file, "\" is written twice into one checkpoint");
  if (!failure_.empty()) {
    return;  // this checkpoint is lost already
  }
  failure_ = failure_of([&] { written_.push_back({file, write(temporary_ / file)}); });
}

void CheckpointWriter::write_tensors(const std::string& file,
                                     const std::vector<NamedTensor>& tensors,
                                     const std::map<std::string, std::string>& metadata) {
  record(file, [&](const fs::path& path) {
    return write_safetensors(path, tensors, metadata,
                             [](const fs::path& written) { SafetensorsFile(written, kKind); });
  });
}

void CheckpointWriter::write_text(const std::string& file, std::string_view text) {
  record(file, [&](const fs::path& path) { return drrl::write_text(path, text); });
}

fs::path CheckpointWriter::commit(int64_t keep_last) {
  Json report = {{"failure", failure_}, {"files", Json::array()}};
  for (const Written& item : written_) {
    report["files"].push_back(
        {{"file", item.file}, {"bytes", item.digest.bytes}, {"xxh3", to_hex(item.digest.xxh3)}});
  }
  // Messages of the system may hold bytes of any encoding.
  const std::vector<std::string> reports = exchange_(
      report.dump(-1, ' ', true, Json::error_handler_t::replace));

  std::string failure;
  if (world_rank_ == 0) {
    failure = failure_of([&] { publish(reports, keep_last); });
    remove_quietly(
        temporary_);  // what was not renamed away: the failed one, or the one that was replaced
  }
  temporary_.clear();
  const std::string of_rank_0 = exchange_(failure).front();
  check(ErrorKind::kStorage, of_rank_0.empty(), "checkpoint ", root_ / folder_name(step_),
        " was not written: ", of_rank_0);
  return root_ / folder_name(step_);
}

void CheckpointWriter::publish(const std::vector<std::string>& reports, int64_t keep_last) {
  check(ErrorKind::kInternal, static_cast<int64_t>(reports.size()) == world_size_,
        "the exchange returned ", reports.size(), " texts of ", world_size_, " ranks");
  Json files = Json::object();
  for (size_t rank = 0; rank < reports.size(); ++rank) {
    const Json report = Json::parse(reports[rank]);
    const auto failure = report.at("failure").get<std::string>();
    check(ErrorKind::kStorage, failure.empty(), "rank ", rank, ": ", failure);
    for (const Json& item : report.at("files")) {
      const auto file = item.at("file").get<std::string>();
      check(ErrorKind::kInternal, !files.contains(file), "rank ", rank,
            " and another rank both wrote \"", file, "\"");
      files[file] = {{"bytes", item.at("bytes")}, {"xxh3", item.at("xxh3")}, {"rank", rank}};
      // On a shared file system that rank 0 does not see (a local folder on each node) the
      // checkpoint would be in pieces.
      const FileReader seen(temporary_ / file, ErrorKind::kStorage);
      check(ErrorKind::kStorage, seen.size() == item.at("bytes").get<uint64_t>(), "rank ", rank,
            " wrote ", item.at("bytes"), " bytes of ", seen.path(), ", but rank 0 sees ",
            seen.size());
    }
  }
  const std::vector<Saved> before = saved_in(root_);
  const int64_t save = before.empty() ? 1 : std::max<int64_t>(before.front().save, 0) + 1;
  Json manifest = {{"format", kFormat}, {"version", kVersion},       {"step", step_},
                   {"save", save},      {"world_size", world_size_}, {"files", files}};
  manifest["manifest_xxh3"] = self_checksum(manifest);
  drrl::write_text(temporary_ / kManifest, manifest.dump(2) + "\n");
  sync_directory(temporary_);
  CheckpointReader::open_directory(temporary_, /*verify_all=*/false);
  replace_folder(temporary_, root_ / folder_name(step_));
  sync_directory(root_);
  if (std::error_code error; fs::is_symlink(fs::symlink_status(root_ / kLatest, error))) {
    remove_quietly(root_ / kLatest);  // not to be followed
  }
  drrl::write_text(root_ / kLatest, folder_name(step_) + "\n");
  prune(keep_last);
}

void CheckpointWriter::prune(int64_t keep_last) const {
  // In the order of saving: the new one is the newest even if later steps of an abandoned run are
  // still there.
  int64_t kept = 1;
  for (const auto& [save, is_latest, step] : saved_in(root_)) {
    if (step == step_ || keep_last <= 0 || kept++ < keep_last) {
      continue;
    }
    // Renamed first, so that a folder that is half removed no longer looks like a checkpoint.
    const fs::path folder = root_ / folder_name(step);
    const fs::path doomed = root_ /
                            (std::string(kTemporaryPrefix) + "removed-" + folder_name(step));
    std::error_code error;
    fs::rename(folder, doomed, error);
  }
  std::error_code error;
  std::vector<fs::path> leftovers;
  for (fs::directory_iterator item(root_, error), end; !error && item != end;
       item.increment(error)) {
    if (item->path().filename().string().starts_with(kTemporaryPrefix)) {
      leftovers.push_back(item->path());
    }
  }
  std::for_each(leftovers.begin(), leftovers.end(), remove_quietly);
}

bool CheckpointReader::any(const fs::path& root) {
  std::error_code error;  // also a link that leads nowhere is something
  return fs::exists(fs::symlink_status(root / kLatest, error)) || !steps_in(root).empty();
}

std::optional<fs::path> CheckpointReader::latest(const fs::path& root) {
  const fs::path pointer = root / kLatest;
  if (!path_exists(pointer, kKind)) {
    return std::nullopt;
  }
  std::string text = read_text(pointer, kKind, 4096);
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r' || text.back() == ' ')) {
    text.pop_back();
  }
  check(kKind, step_of(text).has_value(), pointer, " says ",
        Json(text).dump(-1, ' ', true, Json::error_handler_t::replace),
        "; expected the name of a checkpoint folder such as ", folder_name(120));
  return root / text;
}

CheckpointReader CheckpointReader::open(const fs::path& path, const Options& options) {
  check(kKind, is_folder(path, kKind), path,
        " is not a folder; expected a checkpoint, or a folder of checkpoints");
  const std::string own_name = fs::absolute(path).lexically_normal().filename().string();
  check(kKind, !own_name.starts_with(kTemporaryPrefix), path, " is an unfinished checkpoint");
  const bool is_checkpoint = path_exists(path / kManifest, kKind) || step_of(own_name).has_value();
  if (is_checkpoint) {
    return open_directory(path, options.verify_all);
  }

  std::optional<fs::path> named;
  std::string failure = failure_of([&] {
    named = latest(path);
    check(kKind, named.has_value(), path, " has neither a file \"", kLatest, "\" nor a file \"",
          kManifest, "\": there is no checkpoint");
    read_manifest(*named);
  });
  const bool damaged = !failure.empty();  // and said so below
  check(kKind, !damaged || options.on_fallback != nullptr, failure);
  if (damaged) {
    options.on_fallback(failure);
  }
  for (const auto& [save, is_latest, step] : saved_in(path, named)) {
    if (is_latest && damaged) {
      continue;
    }
    const fs::path folder = path / folder_name(step);
    std::optional<CheckpointReader> result;
    const std::string wrong = failure_of(
        [&] { result.emplace(open_directory(folder, options.verify_all)); });
    if (result) {
      if (!is_latest && options.on_fallback != nullptr) {
        options.on_fallback(failure.empty()
                                ? c10::str("using ", folder, ", which was saved after ", *named,
                                           ", the one that \"", kLatest, "\" names")
                                : c10::str("using ", folder, " instead"));
      }
      return std::move(*result);
    }
    check(kKind, options.on_fallback != nullptr, wrong);
    options.on_fallback(wrong);
    failure = wrong;
  }
  raise(kKind, path, " has no sound checkpoint; the last one tried: ", failure);
}

CheckpointReader CheckpointReader::open_directory(const fs::path& directory, bool verify_all) {
  CheckpointReader reader(directory);
  const fs::path path = directory / kManifest;
  const Json manifest = read_manifest(directory);
  try {
    reader.checksum_ = manifest.at("manifest_xxh3").get<std::string>();
    reader.version_ = manifest.at("version").get<int>();
    reader.step_ = manifest.at("step").get<int64_t>();
    reader.world_size_ = manifest.at("world_size").get<int64_t>();
    for (const auto& [file, item] : manifest.at("files").items()) {
      check(kKind, is_file_name(file), path, " lists ",
            Json(file).dump(-1, ' ', true, Json::error_handler_t::replace),
            ", which cannot be a file of a checkpoint");
      const auto checksum = item.at("xxh3").get<std::string>();
      check(kKind,
            checksum.size() == 16 &&
                checksum.find_first_not_of("0123456789abcdef") == std::string::npos,
            path, ": \"", file, "\" has checksum \"", checksum,
            "\"; expected 16 hexadecimal digits");
      reader.files_[file] = {item.at("bytes").get<uint64_t>(), std::stoull(checksum, nullptr, 16)};
    }
  } catch (const Json::exception& error) {
    raise(kKind, path, " is damaged: ", error.what());
  }
  const auto named = step_of(fs::absolute(directory).lexically_normal().filename().string());
  check(kKind, !named || *named == reader.step_, path, " is of step ", reader.step_,
        ", unlike its folder");

  for (const auto& [file, digest] : reader.files_) {
    const fs::path item = directory / file;
    check(kKind, path_exists(item, kKind), item, " is missing; ", kManifest, " lists it with ",
          digest.bytes, " bytes");
    const FileReader opened(item, kKind);
    check(kKind, opened.size() == digest.bytes, item, " has ", opened.size(), " bytes; ", kManifest,
          " says ", digest.bytes);
    if (verify_all) {
      reader.verify(file);
    }
  }
  return reader;
}

void CheckpointReader::verify(const std::string& file) const {
  const auto found = files_.find(file);
  check(kKind, found != files_.end(), directory_, " has no file \"", file, "\"");
  if (verified_[file]) {
    return;
  }
  const fs::path path = directory_ / file;
  const FileDigest actual = FileReader(path, kKind).digest();
  const FileDigest& expected = found->second;
  check(kKind, actual.bytes == expected.bytes && actual.xxh3 == expected.xxh3, path,
        " is damaged: its checksum is ", to_hex(actual.xxh3), " over ", actual.bytes, " bytes; ",
        kManifest, " says ", to_hex(expected.xxh3), " over ", expected.bytes);
  verified_[file] = true;
}

std::vector<std::string> CheckpointReader::files() const {
  std::vector<std::string> result;
  for (const auto& [file, digest] : files_) {
    result.push_back(file);
  }
  return result;
}

SafetensorsFile CheckpointReader::tensors(const std::string& file) const {
  verify(file);
  return SafetensorsFile(directory_ / file, kKind);
}

std::string CheckpointReader::text(const std::string& file) const {
  verify(file);
  return read_text(directory_ / file, kKind, UINT64_MAX);
}

}  // namespace drrl
