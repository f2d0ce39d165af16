#include "launch/options/flags.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>

#include <gflags/gflags.h>

#include "core/error.h"
#include "core/io/file_io.h"
#include "distributed/collectives/agreement.h"
#include "distributed/topology/environment.h"
#include "distributed/topology/mesh.h"
#include "launch/runtime/process.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/config.h"
#include "models/causal_lm/model_folder.h"
#include "models/causal_lm/tokenizer.h"
#include "models/data/token_file.h"

DEFINE_string(model, "", "Hugging Face model directory (config.json, *.safetensors)");
DEFINE_string(data, "",
              "token file, without .bin or .idx (Megatron's format; launch/prepare/prepare.py text "
              "writes it)");
DEFINE_int64(seq_len, 2048,
             "length of a sequence, at most the model's max_position_embeddings [tokens]");
DEFINE_int64(tp, 1, "tensor-parallel processes: each holds a part of every layer [processes]");
DEFINE_int64(dp, 0, "data-parallel processes; 0: all that --tp and --cp leave [processes]");
DEFINE_int64(cp, 1, "context-parallel processes: each sequence is split over them [processes]");
DEFINE_string(device, "cpu", "cpu or cuda");
DEFINE_string(dtype, "fp32",
              "precision of activations and matrix products: fp32 or bf16; weights and moments are "
              "always fp32");
DEFINE_uint64(seed, 1, "of data order and random decisions");
DEFINE_int64(threads, 0,
             "CPU threads of each process; 0: as OMP_NUM_THREADS says, or the node's cores shared "
             "out to its processes [threads]");
DEFINE_int64(timeout_s, 600, "longest that a collective may take before the job is ended [s]");
DEFINE_int64(
    watchdog_timeout_s, -1,
    "longest that a process may give no sign of life (a collective, a microbatch, a piece of a "
    "file) at the start, in a step, an evaluation or a checkpoint before it ends itself; "
    "-1: three times --timeout_s; 0: never [s]");
DEFINE_string(json, "", "file for the results, as JSON");

DEFINE_string(attention, "exact",
              "exact, or lowrank: exact near and sink tokens, low-rank factors for far ones");
DEFINE_string(
    rank_policy, "fixed",
    "who chooses the ranks of --attention=lowrank: exact, fixed, energy, random, greedy, dp or rl");
DEFINE_int64(rank, 32, "rank of scores and values of far tokens under --rank_policy=fixed");
DEFINE_string(rank_buckets, "",
              "the ranks to choose from, ascending, e.g. 16,32,48; exact is always there; empty: "
              "those that the device runs without waste");
DEFINE_double(rank_budget, 0.585,
              "attention operations, everything counted (with --latency: ms), under "
              "--rank_policy=random, greedy, dp and rl [of exact attention]");
DEFINE_double(energy, 0.99, "share of the spectrum's energy to keep under --rank_policy=energy");
DEFINE_string(
    policy, "",
    "file for --rank_policy=random, greedy, dp and rl; drrl-policy calibrate and train write it");
DEFINE_string(latency, "",
              "file that drrl-bench latency writes; random, greedy, dp and rl then spend "
              "--rank_budget of exact attention's time on this device instead of its "
              "operations");
DEFINE_double(guard_eps, 0,
              "raise a far pair's ranks until its starting bases lose at most this share of the "
              "scores' and values' norm, certified without a decomposition; "
              "needs --policy; 0: no guard");
DEFINE_double(drop, 0,
              "drop tiles of far tokens, 16 rows of a head and 64 keys, in which nothing weighs "
              "this share of a row's softmax; 0: none");
DEFINE_bool(gates, false,
            "under dp and rl (drrl-policy train: for rl), choose gates along with the ranks: "
            "single entries, a query and a key, of large weight are exact after all");
DEFINE_double(guard_decay, 1,
              "factor on --guard_eps after every training step: below 1 the guard tightens");
DEFINE_int64(basis_updates, 2,
             "rounds of incremental update for each far basis, from those of --policy or of the "
             "first block; -1: a full decomposition each");
DEFINE_int64(near_block, 256, "block of tokens that attend to each other exactly [tokens]");
DEFINE_int64(sink_tokens, 4, "first tokens of a sequence, attended to exactly by all [tokens]");

namespace drrl {

at::Device device_flag(const Environment& environment) {
  if (FLAGS_device == "cpu") {
    return at::kCPU;
  }
  check(ErrorKind::kUsage, FLAGS_device == "cuda", "--device must be cpu or cuda, got '",
        FLAGS_device, "'");
  check(ErrorKind::kUsage, at::hasCUDA() && at::getNumGPUs() > 0,
        "--device=cuda, but this process sees no usable GPU");
  return at::Device(at::kCUDA,
                    static_cast<c10::DeviceIndex>(environment.local_rank %
                                                  static_cast<int64_t>(at::getNumGPUs())));
}

at::ScalarType dtype_flag(const char* flag, const std::string& value) {
  check(ErrorKind::kUsage, value == "fp32" || value == "bf16", "--", flag,
        " must be fp32 or bf16, got '", value, "'");
  return value == "fp32" ? at::kFloat : at::kBFloat16;
}

MeshShape mesh_flags(const Environment& environment) {
  check(ErrorKind::kUsage, FLAGS_tp >= 1, "--tp must be at least 1, got ", FLAGS_tp);
  check(ErrorKind::kUsage, FLAGS_dp >= 0, "--dp must not be negative, got ", FLAGS_dp);
  check(ErrorKind::kUsage, FLAGS_cp >= 1, "--cp must be at least 1, got ", FLAGS_cp);
  check(ErrorKind::kUsage,
        FLAGS_dp > 0 || (environment.world_size % FLAGS_tp == 0 &&
                         environment.world_size / FLAGS_tp % FLAGS_cp == 0),
        environment.world_size, " processes cannot be divided by --tp=", FLAGS_tp,
        FLAGS_cp == 1 ? std::string() : c10::str(" and --cp=", FLAGS_cp));
  MeshShape shape{FLAGS_tp, FLAGS_dp > 0 ? FLAGS_dp : environment.world_size / FLAGS_tp / FLAGS_cp,
                  FLAGS_cp};
  check_shape(shape, environment.world_size);
  return shape;
}

void check_whole_groups(const std::string& what, int64_t tp, const ModelConfig& config) {
  check(ErrorKind::kUsage, tp <= config.num_key_value_heads, what,
        " needs whole KV groups on each process, --tp=", tp, " is more than the ",
        config.num_key_value_heads, " KV heads of ", FLAGS_model);
}

void check_loss(int64_t sequence, double loss) {
  check(ErrorKind::kNumerics, std::isfinite(loss), "the loss of sequence ", sequence, " of ",
        FLAGS_data, " is ", loss, ", expected a finite one: weights of ", FLAGS_model,
        " are not finite, or too large for --dtype=", FLAGS_dtype);
}

void check_seq_len(const ModelConfig& config) {
  check(ErrorKind::kUsage, FLAGS_seq_len >= 1 && FLAGS_seq_len <= config.max_position_embeddings,
        "--seq_len=", FLAGS_seq_len, " must lie in [1, ", config.max_position_embeddings,
        "], the positions of ", FLAGS_model);
}

ModelConfig read_config() {
  const auto watched = watch(watchdog(), "reading the configuration");
  return ModelConfig::load(FLAGS_model);
}

ModelConfig read_model_config() {
  const auto watched = watch(watchdog(), "reading the configuration");
  return load_model_config(FLAGS_model);
}

void load_weights(CausalLM& model, const Group& world) {
  {
    const auto watched = watch(watchdog(), "loading weights");
    model.load(FLAGS_model);
  }
  roll_call(world, "the end of loading weights");
}

std::shared_ptr<const TokenFile> open_token_file(const std::string& prefix,
                                                 const ModelConfig& config,
                                                 const Environment& environment) {
  constexpr int64_t kScanTokens = int64_t{1} << 28;  // read in about a second
  const auto watched = watch(watchdog(), "opening the data");
  auto file = std::make_shared<const TokenFile>(TokenFile::open(prefix));
  if (environment.world_rank == 0) {
    check_tokenizer(prefix, FLAGS_model);
  }
  if (environment.world_rank == 0 && file->tokens() <= kScanTokens) {
    file->check_vocabulary(config.vocab_size);
  }
  return file;
}

void naming(const std::string& flag, const std::string& value,
            const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    raise(error.kind(), "--", flag, "=", value, ": ", error.what());
  }
}

void check_outputs(const Environment& environment, const std::vector<std::string>& flags) {
  if (environment.world_rank != 0) {
    return;
  }
  std::map<std::filesystem::path, std::string>
      inputs;  // files that are read; the folder of --model
  for (const char* flag :
       {"model", "data", "valid_data", "policy", "latency", "examples", "traces"}) {
    std::string value;
    if (std::find(flags.begin(), flags.end(), flag) != flags.end() ||
        !google::GetCommandLineOption(flag, &value) || value.empty()) {
      continue;
    }
    std::error_code unknown;
    const bool text = std::string_view(flag).ends_with("data");
    for (const auto& file : text ? std::vector<std::filesystem::path>{token_path(value, ".bin"),
                                                                      token_path(value, ".idx")}
                                 : std::vector<std::filesystem::path>{value}) {
      if (std::filesystem::exists(file, unknown)) {
        inputs.emplace(std::filesystem::weakly_canonical(file, unknown), flag);
      }
    }
  }
  std::map<std::filesystem::path, std::string> named;
  for (const std::string& flag : flags) {
    std::string value;
    if (!google::GetCommandLineOption(flag.c_str(), &value) || value.empty()) {
      continue;
    }
    naming(flag, value, [&] { check_writable(value); });
    std::error_code not_a_file;  // such as a pipe behind /dev/stdout
    const auto file = std::filesystem::weakly_canonical(value, not_a_file);
    if (!not_a_file && (!std::filesystem::exists(file) || std::filesystem::is_regular_file(file))) {
      auto input = inputs.find(file);
      input = input == inputs.end() ? inputs.find(file.parent_path()) : input;
      check(ErrorKind::kUsage, input == inputs.end(), "--", flag, "=", value,
            " would replace what --", input == inputs.end() ? "" : input->second, " reads");
      const auto [other, is_new] = named.emplace(file, flag);
      check(ErrorKind::kUsage, is_new, "--", flag, "=", value, ": --", other->second,
            " names this file, too, and one would replace the other");
    }
  }
}

void require(const char* flag, const std::string& value) {
  check(ErrorKind::kUsage, !value.empty(), "--", flag, " is required");
}

}  // namespace drrl
