#include "models/training/training_state.h"

#include <algorithm>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "models/causal_lm/weights.h"
#include "models/training/checkpoint.h"

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

/// The tensor `name` of a shard, which must have that shape and dtype.
at::Tensor read_tensor(const SafetensorsFile& file, const std::string& name, at::IntArrayRef shape,
                       at::ScalarType dtype) {
  check(ErrorKind::kCheckpoint, file.contains(name), file.path().string(), " lacks tensor ", name,
        ": it is a checkpoint of another model");
  const auto& entry = file.entry(name);
  check(ErrorKind::kCheckpoint, shape == entry.shape && entry.dtype == dtype, file.path().string(),
        ": tensor ", name, " is ", entry.dtype, at::IntArrayRef(entry.shape), ", expected ", dtype,
        shape);
  return file.tensor(name);
}

/// The shards of a checkpoint, which `size` tensor-parallel ranks wrote, as tensor-parallel rank
/// `rank` of `state` reads them: its own one first, which on the same layout is all that it needs.
class Shards {
 public:
  Shards(const CheckpointReader& reader, const TrainingState& state, int64_t size) : state_(state) {
    const ModelConfig& config = state.model.config();
    const Group& tp = state.mesh.tp();
    wanted_ = parameter_layouts(config, tp.size(), tp.rank());
    for (int64_t i = 0; i < size; ++i) {
      const int64_t rank = (tp.rank() + i) % size;
      shards_.push_back({parameter_layouts(config, size, rank),
                         [&reader, rank] { return reader.tensors(shard_file(rank)); },
                         {}});
    }
  }

  void restore() {
    const at::NoGradGuard no_grad;
    const auto moments = state_.optimizer.state();
    for (size_t i = 0; i < wanted_.size(); ++i) {
      const Parameter& parameter = state_.model.parameters()[i];
      restore(i, "model." + parameter.name, parameter.value.detach());
      for (const std::string& moment :
           {"exp_avg." + parameter.name, "exp_avg_sq." + parameter.name}) {
        restore(i, "optimizer." + moment, moments.at(moment));
      }
    }
    const at::Tensor& step = moments.at("step");
    step.copy_(
        read_tensor(file(shards_.front()), "optimizer.step", step.sizes(), step.scalar_type()));
  }

 private:
  struct Shard {
    std::vector<ParameterLayout> layouts;
    std::function<SafetensorsFile()>
        open;  // when first needed: that is when its checksum is verified
    std::optional<SafetensorsFile> file;
  };

  static const SafetensorsFile& file(Shard& shard) {
    return shard.file ? *shard.file : shard.file.emplace(shard.open());
  }

  /// target, which is laid out as parameter `index`, <- the overlaps of its parts with those of the
  /// shards.
  void restore(size_t index, const std::string& name, const at::Tensor& target) {
    const ParameterLayout& to = wanted_[index];
    for (Shard& shard : shards_) {
      const ParameterLayout& from = shard.layouts[index];
      at::Tensor tensor;
      for (size_t p = 0; p < to.parts.size(); ++p) {
        const WeightPart& want = to.parts[p];
        const WeightPart& have = from.parts[p];
        const int64_t begin = std::max(want.start, have.start);
        const int64_t count = std::min(want.start + want.length, have.start + have.length) - begin;
        if (count <= 0) {
          continue;
        }
        if (!tensor.defined()) {
          tensor = read_tensor(file(shard), name, from.shape, target.scalar_type());
        }
        region(target, want)
            .narrow(want.dim, begin - want.start, count)
            .copy_(region(tensor, have).narrow(have.dim, begin - have.start, count));
      }
      if (!to.sharded) {
        return;  // the same in all shards
      }
    }
  }

  const TrainingState& state_;
  std::vector<ParameterLayout> wanted_;
  std::vector<Shard> shards_;
};

/// "lr: 0.001 -> 0.0003, seed: 1 -> 2"; empty if all are equal.
std::string differences(const std::map<std::string, std::string>& saved,
                        const std::map<std::string, std::string>& now) {
  std::string text;
  const auto note = [&](const std::string& name, const std::string& before,
                        const std::string& after) {
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

/// What an observer saved in the checkpoint of a process; nullopt if it has no state, or was not
/// there. Version 1 has one file with what is now the state of "rank-policy" and, after a zero
/// byte, that of "online-policy"; and exact attention is called full.
std::optional<std::string> observer_state(const CheckpointReader& reader,
                                          const std::string& process, const std::string& name) {
  if (reader.version() > 1) {
    const std::string file = process + "." + name;
    return !name.empty() && reader.contains(file) ? std::optional(reader.text(file)) : std::nullopt;
  }
  const std::string all = reader.text(process + ".policy");
  const size_t end = std::min(all.find('\0'), all.size());
  if (name == "online-policy" && end < all.size()) {
    return all.substr(end + 1);
  }
  std::string description = all.substr(0, end);
  const std::string full = "ranks: full", exact = "ranks: exact";
  if (const size_t at = description.find(full); at != std::string::npos) {
    description.replace(at, full.size(), exact);
  }
  return name == "rank-policy" && !description.empty() ? std::optional(description) : std::nullopt;
}

}  // namespace

std::filesystem::path save_training_state(const std::filesystem::path& root,
                                          const TrainingState& state,
                                          const TrainingPosition& position, int64_t keep) {
  const Group& world = state.mesh.world();
  const int64_t tp = state.mesh.tp().rank();
  const int64_t dp = state.mesh.data().rank();
  const at::Device device = device_of(state.model);
  CheckpointWriter writer(root, position.step, world.rank(), world.size(),
                          exchange_over(world, device));
  if (dp == 0) {
    writer.write_tensors(shard_file(tp), shard_tensors(state));
  }
  std::vector<NamedTensor> rng;
  for (const auto& [name, generator] : generators(device)) {
    rng.push_back({name, generator.get_state()});
  }
  writer.write_tensors(rank_file(tp, dp, ".safetensors"), rng);
  for (const auto& observer : state.observers) {
    if (const std::string name = observer->state_name(); !name.empty()) {
      writer.write_text(rank_file(tp, dp, ("." + name).c_str()), observer->save());
    }
  }
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

std::optional<TrainingPosition> restore_training_state(
    const std::filesystem::path& root, const TrainingState& state, bool allow_changes,
    const std::function<void(const std::string&)>& warn) {
  const Group& world = state.mesh.world();
  const at::Device device = device_of(state.model);
  // World rank 0 chooses and verifies; the others take its word, so that all resume from the same
  // folder.
  std::string chosen;
  std::string failure;
  if (world.rank() == 0) {
    try {
      if (CheckpointReader::any(root)) {
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
  // Folders of one name on several machines need not be one folder.
  check_agreement(exchange_over(world, device),
                  {{"its manifest's checksum", reader.checksum(), chosen}}, ErrorKind::kCheckpoint,
                  "checkpoint");
  const auto run = nlohmann::json::parse(reader.text(kRunFile), nullptr,
                                         /*allow_exceptions=*/false);
  TrainingPosition position;
  int64_t tensor_parallel = 0;
  int64_t data_parallel = 0;
  int64_t context_parallel = 1;
  std::map<std::string, std::string> saved;
  try {
    position = {run.at("step").get<int64_t>(), run.at("samples").get<int64_t>(),
                run.at("tokens").get<int64_t>()};
    tensor_parallel = run.at("tensor_parallel").get<int64_t>();
    data_parallel = run.at("data_parallel").get<int64_t>();
    context_parallel = run.value("context_parallel", int64_t{1});
    saved = run.at("options").get<std::map<std::string, std::string>>();
  } catch (const nlohmann::json::exception& error) {
    raise(ErrorKind::kCheckpoint, chosen, "/", kRunFile,
          " is not what drrl writes: ", error.what());
  }
  check(ErrorKind::kCheckpoint, tensor_parallel >= 1 && data_parallel >= 1 && context_parallel >= 1,
        chosen, "/", kRunFile, " says tensor_parallel = ", tensor_parallel,
        ", data_parallel = ", data_parallel, " and context_parallel = ", context_parallel,
        "; expected at least 1");
  if (reader.version() == 1) {
    for (const char* option : {"attention", "rank_policy"}) {
      if (const auto found = saved.find(option); found != saved.end() && found->second == "full") {
        found->second = "exact";
      }
    }
  }
  const std::string changed = differences(saved, state.fingerprint);
  check(ErrorKind::kCheckpoint, changed.empty() || allow_changes, chosen,
        " belongs to a run with other options (", changed,
        "); choose another folder (--output), or if the change is meant override the check "
        "(--resume_override)");
  if (!changed.empty() && warn && world.rank() == 0) {
    warn("resuming with changed options: " + changed);
  }

  const MeshShape& shape = state.mesh.shape();
  const bool same_layout = tensor_parallel == shape.tp && data_parallel == shape.dp &&
                           context_parallel == shape.cp;
  if (!same_layout && warn && world.rank() == 0) {
    warn(c10::str("resuming a run of tensor ", tensor_parallel, " x context ", context_parallel,
                  " x data ", data_parallel, " processes on tensor ", shape.tp, " x context ",
                  shape.cp, " x data ", shape.dp, ": equal up to rounding, not bit for bit"));
  }
  Shards(reader, state, tensor_parallel).restore();
  // Whose generators and policy this rank takes over: on the same layout its own.
  const int64_t tp = state.mesh.tp().rank() % tensor_parallel;
  const int64_t dp = state.mesh.data().rank() % (data_parallel * context_parallel);
  const SafetensorsFile rng = reader.tensors(rank_file(tp, dp, ".safetensors"));
  for (auto [name, generator] : generators(device)) {
    if (rng.contains(name)) {
      generator.set_state(rng.tensor(name));
    }
  }
  for (const auto& observer : state.observers) {
    const auto saved_state = observer_state(reader, rank_file(tp, dp, ""), observer->state_name());
    if (saved_state) {
      observer->load(*saved_state);
    }
  }
  return position;
}

}  // namespace drrl
