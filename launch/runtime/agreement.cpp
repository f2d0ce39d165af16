#include "launch/runtime/agreement.h"

#include <optional>
#include <set>

#include <gflags/gflags.h>

#include "core/error.h"
#include "core/io/file_io.h"
#include "distributed/collectives/agreement.h"
#include "distributed/topology/mesh.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/runtime/process.h"
#include "models/causal_lm/weight_store.h"
#include "models/data/token_file.h"

namespace drrl {
namespace {

// Options that may differ: what they do, a process does for itself.
const std::set<std::string> kOwn = {"threads", "timeout_s", "watchdog_timeout_s", "log_every"};

// Options that name files: each process may have its own copy at its own place. --output is none of
// them: all write into one folder.
const std::set<std::string> kFiles = {"model",     "data",         "valid_data", "policy",
                                      "latency",   "examples",     "traces",     "json",
                                      "decisions", "examples_out", "csv",        "plot"};

// Made when the program starts, where all processes come: making it later would wait without an end
// for one that does not.
std::optional<Group> agreement_world;

void agree(const Environment& environment, const Facts& facts, const char* what) {
  if (environment.launcher == Launcher::kTorchrun && FLAGS_device == "cpu") {
    return;  // Mesh::create will refuse that
  }
  const auto watched = watch(watchdog(), c10::str("agreement on ", what));
  const std::chrono::seconds timeout(FLAGS_timeout_s);
  if (environment.launcher == Launcher::kTorchrun) {
    check_agreement(exchange_over_torchrun(environment, timeout), facts, ErrorKind::kUsage, what);
    return;
  }
  if (!agreement_world) {
    agreement_world = create_world_group("agreement", environment, at::kCPU, timeout);
    agreement_world->watch(watchdog());
  }
  roll_call(*agreement_world, c10::str("the agreement on ", what));
  check_agreement(exchange_over(*agreement_world), facts, ErrorKind::kUsage, what);
}

Fact contents(const std::string& name, const std::filesystem::path& path,
              const FileDigest& digest) {
  return {name, c10::str(digest.bytes, " bytes of checksum ", to_hex(digest.xxh3)), path.string()};
}

Fact contents(const std::string& name, const std::filesystem::path& path, ErrorKind kind) {
  return contents(name, path, FileReader(path, kind).sample());
}

}  // namespace

void end_agreements() {
  agreement_world.reset();
}

void agree_on_options(const Environment& environment, const std::string& command) {
  if (environment.world_size == 1) {
    return;
  }
  Facts facts = {{"the program", command}, {"its version", version_line()}};
  std::string names;
  for (const Option& option : options()) {
    names += option.name + " ";
    if (kFiles.contains(option.name)) {
      facts.push_back({"--" + option.name, option.value.empty() ? "" : "given", option.value});
    } else if (!kOwn.contains(option.name)) {
      facts.push_back({"--" + option.name, option.value});
    }
  }
  facts.push_back({"the checksum of its options' names", to_hex(hash_bytes(names))});
  agree(environment, facts, "options");
}

void agree_on_inputs(const Environment& environment, const std::vector<std::string>& inputs) {
  if (environment.world_size == 1) {
    return;
  }
  Facts facts;
  for (const std::string& input : inputs) {
    std::string value;
    google::GetCommandLineOption(input == "config" ? "model" : input.c_str(), &value);
    if (value.empty()) {
      continue;
    }
    const std::filesystem::path path = value;
    if (input == "config" || input == "model") {
      facts.push_back(contents("config.json of --model",
                               is_folder(path, ErrorKind::kModel) ? path / "config.json" : path,
                               ErrorKind::kModel));
    }
    if (input == "model") {
      const WeightStore store = WeightStore::open(path);
      facts.push_back(contents("the weights of --model", store.path(), store.sample()));
    } else if (input == "data" || input == "valid_data") {
      facts.push_back(
          contents("the index of --" + input, token_path(path, ".idx"), ErrorKind::kData));
      facts.push_back(
          contents("the text of --" + input, token_path(path, ".bin"), ErrorKind::kData));
    } else if (input == "traces" && !path_exists(path, ErrorKind::kModel)) {
      facts.push_back({"the file of --traces", "not there", value});
    } else if (input != "config") {
      facts.push_back(contents("the file of --" + input, path,
                               input == "examples" ? ErrorKind::kData : ErrorKind::kModel));
    }
  }
  agree(environment, facts, "inputs");
}

}  // namespace drrl
