#include "models/training_state.h"

#include "core/error.h"
#include "models/checkpoint.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>

#include <nlohmann/json.hpp>

namespace drrl {
namespace {

constexpr const char* kRunFile = "run.json";

std::string shard_file(int64_t tensor_rank) {
  return c10::str("shard-tp", tensor_rank, ".safetensors");
}

std::string rank_file(int64_t tensor_rank, int64_t data_rank, const char* extension) {
  return c10::str("rank-tp", tensor_rank, "-dp", data_rank, extension);
}

at::Device device_of(const CausalLM& model) {
  return model.parameters().front().value.device();
}

/// Live tensors by the names they have in shard-tpT.safetensors.
std::vector<NamedTensor> shard_tensors(const TrainingState& state) {
  std::vector<NamedTensor> tensors;
  for (const Parameter& parameter : state.model.parameters()) {
    tensors.push_back({"model." + parameter.name, parameter.value.detach()});
  }
  for (const auto& [name, tensor] : state.optimizer.state()) {
    tensors.push_back({"optimizer." + name, tensor});
  }
  return tensors;
}

/// The generators that a rank draws from, by the names of their states.
std::map<std::string, at::Generator> generators(at::Device device) {
  std::map<std::string, at::Generator> all{{"rng.cpu", at::detail::getDefaultCPUGenerator()}};
  if (device.is_cuda()) {
    all.emplace("rng.cuda", at::globalContext().defaultGenerator(device));
  }
  return all;
}

void restore_tensor(const SafetensorsFile& file, const NamedTensor& target) {
  const at::NoGradGuard no_grad;
  check(ErrorKind::kCheckpoint, file.contains(target.name), file.path().string(), " lacks tensor ", target.name,
        ": it is a checkpoint of another model");
  const auto& entry = file.entry(target.name);
  check(ErrorKind::kCheckpoint, entry.shape == target.value.sizes().vec() && entry.dtype == target.value.scalar_type(),
        file.path().string(), ": tensor ", target.name, " is ", entry.dtype, at::IntArrayRef(entry.shape), ", expected ",
        target.value.scalar_type(), target.value.sizes());
  target.value.copy_(file.tensor(target.name));
}

/// "lr: 0.001 -> 0.0003, seed: 1 -> 2"; empty if all are equal.
std::string differences(const std::map<std::string, std::string>& saved, const std::map<std::string, std::string>& now) {
  std::string text;
  const auto note = [&](const std::string& name, const std::string& before, const std::string& after) {
    text += (text.empty() ? "" : ", ") + name + ": " + before + " -> " + after;
  };
  for (const auto& [name, value] : now) {
    const auto before = saved.find(name);
    if (before == saved.end()) {
      note(name, "(none)", value);
    } else if (before->second != value) {
      note(name, before->second, value);
    }
  }
  for (const auto& [name, value] : saved) {
    if (!now.contains(name)) {
      note(name, value, "(none)");
    }
  }
  return text;
}

}  // namespace

std::filesystem::path save_training_state(const std::filesystem::path& root, const TrainingState& state,
                                          const TrainingPosition& position, int64_t keep) {
  const Group& world = state.mesh.world();
  const int64_t tp = state.mesh.tp().rank();
  const int64_t dp = state.mesh.data().rank();
  const at::Device device = device_of(state.model);
  CheckpointWriter writer(root, position.step, world.rank(), world.size(), exchange_over(world, device));
  if (dp == 0) {
    writer.write_tensors(shard_file(tp), shard_tensors(state));
  }
  std::vector<NamedTensor> rng;
  for (const auto& [name, generator] : generators(device)) {
    rng.push_back({name, generator.get_state()});
  }
  writer.write_tensors(rank_file(tp, dp, ".safetensors"), rng);
  writer.write_text(rank_file(tp, dp, ".policy"), state.policy.save ? state.policy.save() : "");
  if (world.rank() == 0) {
    const nlohmann::ordered_json run = {
        {"step", position.step},
        {"samples", position.samples},
        {"tokens", position.tokens},
        {"tensor_parallel", state.mesh.tp().size()},
        {"data_parallel", state.mesh.dp().size()},
        {"context_parallel", state.mesh.cp().size()},
        {"options", state.fingerprint},
    };
    writer.write_text(kRunFile, run.dump(2) + "\n");
  }
  return writer.commit(keep);
}

std::optional<TrainingPosition> restore_training_state(const std::filesystem::path& root, const TrainingState& state,
                                                       bool allow_changes,
                                                       const std::function<void(const std::string&)>& warn) {
  const Group& world = state.mesh.world();
  const at::Device device = device_of(state.model);
  // World rank 0 chooses and verifies; the others take its word, so that all resume from the same folder.
  std::string chosen;
  std::string failure;
  if (world.rank() == 0) {
    try {
      if (CheckpointReader::latest(root)) {
        CheckpointReader::Options options;
        options.on_fallback = warn ? warn : [](const std::string&) {};
        chosen = CheckpointReader::open(root, options).directory().string();
      }
    } catch (const Error& error) {
      failure = error.what();
    }
  }
  if (world.size() > 1) {
    const auto exchange = exchange_over(world, device);
    chosen = exchange(chosen).front();
    failure = exchange(failure).front();
  }
  check(ErrorKind::kCheckpoint, failure.empty(), failure);
  if (chosen.empty()) {
    return std::nullopt;
  }

  CheckpointReader::Options options;
  options.verify_all = false;
  const CheckpointReader reader = CheckpointReader::open(chosen, options);
  const auto run = nlohmann::json::parse(reader.text(kRunFile), nullptr, /*allow_exceptions=*/false);
  TrainingPosition position;
  int64_t tensor_parallel = 0;
  int64_t data_parallel = 0;
  int64_t context_parallel = 1;
  std::map<std::string, std::string> saved;
  try {
    position = {run.at("step").get<int64_t>(), run.at("samples").get<int64_t>(), run.at("tokens").get<int64_t>()};
    tensor_parallel = run.at("tensor_parallel").get<int64_t>();
    data_parallel = run.at("data_parallel").get<int64_t>();
    context_parallel = run.value("context_parallel", int64_t{1});
    saved = run.at("options").get<std::map<std::string, std::string>>();
  } catch (const nlohmann::json::exception& error) {
    raise(ErrorKind::kCheckpoint, chosen, "/", kRunFile, " is not what drrl writes: ", error.what());
  }
  check(ErrorKind::kCheckpoint, tensor_parallel == state.mesh.tp().size(), chosen,
        " was written with tensor_parallel = ", tensor_parallel, " and cannot be resumed with ", state.mesh.tp().size(),
        "; export it on the old layout and start a new run from the exported model");
  const std::string changed = differences(saved, state.fingerprint);
  check(ErrorKind::kCheckpoint, changed.empty() || allow_changes, chosen, " belongs to a run with other options (", changed,
        "); use another output folder, or override the check if the change is meant");
  if (!changed.empty() && warn && world.rank() == 0) {
    warn("resuming with changed options: " + changed);
  }

  const int64_t tp = state.mesh.tp().rank();
  const bool same_layout = data_parallel == state.mesh.dp().size() && context_parallel == state.mesh.cp().size();
  const int64_t dp = same_layout ? state.mesh.data().rank() : 0;
  if (!same_layout && warn && world.rank() == 0) {
    warn(c10::str("resuming a run of ", data_parallel, " data-parallel x ", context_parallel, " context-parallel ranks on ", state.mesh.dp().size(), " x ",
                  state.mesh.cp().size(), ": equal up to rounding, not bit for bit"));
  }
  const SafetensorsFile shard = reader.tensors(shard_file(tp));
  for (const NamedTensor& target : shard_tensors(state)) {
    restore_tensor(shard, target);
  }
  const SafetensorsFile rng = reader.tensors(rank_file(tp, dp, ".safetensors"));
  for (auto [name, generator] : generators(device)) {
    if (rng.contains(name)) {
      generator.set_state(rng.tensor(name));
    }
  }
  if (state.policy.load) {
    state.policy.load(reader.text(rank_file(tp, dp, ".policy")));
  }
  return position;
}

}  // namespace drrl
