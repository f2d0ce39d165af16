#include "launch/options/policy_flags.h"

#include <ATen/Parallel.h>

#include "core/error.h"
#include "distributed/collectives/agreement.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/runtime/process.h"
#include "models/causal_lm/tensor_parallel.h"
#include "policy/agent/agent.h"
#include "policy/calibration/calibration.h"
#include "policy/online/controller_observer.h"
#include "policy/rank_policy.h"
#ifdef DRRL_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <fstream>
#include <optional>
#include <set>

namespace drrl {

Geometry geometry_flags() {
  constexpr int64_t kMostTokens = int64_t{1} << 32;
  check(ErrorKind::kUsage, FLAGS_near_block >= 1 && FLAGS_near_block <= kMostTokens,
        "--near_block must lie in [1, 2^32], got ", FLAGS_near_block);
  check(ErrorKind::kUsage, FLAGS_sink_tokens >= 0 && FLAGS_sink_tokens <= kMostTokens,
        "--sink_tokens must lie in [0, 2^32], got ", FLAGS_sink_tokens);
  return {FLAGS_near_block, FLAGS_sink_tokens};
}

std::vector<int64_t> bucket_flags(const at::Device& device, int64_t head_dim) {
  if (FLAGS_rank_buckets.empty()) {
    return rank_buckets(device, head_dim);
  }
  std::vector<int64_t> buckets = parse_list("rank_buckets", FLAGS_rank_buckets, 1);
  buckets.erase(std::remove(buckets.begin(), buckets.end(), head_dim), buckets.end());
  for (size_t i = 0; i < buckets.size(); ++i) {
    check(ErrorKind::kUsage, (i == 0 || buckets[i] > buckets[i - 1]) && buckets[i] < head_dim,
          "--rank_buckets=", FLAGS_rank_buckets, ", expected ascending ranks of at most head_dim, ",
          head_dim);
  }
  check(ErrorKind::kUsage, !buckets.empty(), "--rank_buckets=", FLAGS_rank_buckets,
        " leaves nothing to choose: expected ranks below head_dim, ", head_dim);
  buckets.push_back(head_dim);
  return buckets;
}

Calibration read_calibration() {
  const auto watched = watch(watchdog(), "reading the rank policy");
  return Calibration::load(FLAGS_policy);
}

void check_calibration(const Calibration& calibration, const ModelConfig& config) {
  check(ErrorKind::kUsage,
        calibration.layers() == config.num_hidden_layers &&
            calibration.groups() == config.num_key_value_heads &&
            calibration.head_dim() == config.head_dim,
        "--policy=", FLAGS_policy, " is of a model with ", calibration.layers(), " layers, ",
        calibration.groups(), " KV groups and head_dim ", calibration.head_dim(), " (",
        calibration.model, "), ", FLAGS_model, " has ", config.num_hidden_layers, ", ",
        config.num_key_value_heads, " and ", config.head_dim);
}

void check_geometry(const Calibration& calibration) {
  const Geometry mine = geometry_flags();
  check(ErrorKind::kUsage, calibration.geometry == mine, "--policy=", FLAGS_policy,
        " was calibrated with --near_block=", calibration.geometry.near_block,
        " and --sink_tokens=", calibration.geometry.sink_tokens, ", these are ", mine.near_block,
        " and ", mine.sink_tokens, ": give those, or calibrate anew");
}

namespace {

/// "AMD EPYC", "NVIDIA H100 80GB HBM3".
std::string device_name(const at::Device& device) {
#ifdef DRRL_WITH_CUDA
  if (device.is_cuda()) {
    cudaDeviceProp properties{};
    check(ErrorKind::kUsage, cudaGetDeviceProperties(&properties, device.index()) == cudaSuccess,
          "the name of ", device.str(), " cannot be read");
    return properties.name;
  }
#endif
  std::ifstream cpus("/proc/cpuinfo");
  for (std::string line; std::getline(cpus, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return device.str();
}

}  // namespace

LatencyKey latency_key(const at::Device& device, int64_t head_dim, int64_t heads_per_group) {
  const std::string versions = version_line();  // drrl's, LibTorch's and MPI's
  return {.device = device_name(device),
          .dtype = FLAGS_dtype,
          .threads = device.is_cuda() ? 0 : at::get_num_threads(),
          .head_dim = head_dim,
          .heads_per_group = heads_per_group,
          .near_block = FLAGS_near_block,
          .update_steps = FLAGS_basis_updates,
          .versions = versions.substr(0, versions.rfind(", "))};
}

std::shared_ptr<const LatencyTable> latency_flag(const at::Device& device, int64_t head_dim,
                                                 int64_t heads_per_group) {
  if (FLAGS_latency.empty()) {
    return nullptr;
  }
  const auto watched = watch(watchdog(), "reading latencies");
  auto table = std::make_shared<const LatencyTable>(LatencyTable::load(FLAGS_latency));
  table->check_key(latency_key(device, head_dim, heads_per_group));
  return table;
}

namespace {

/// The --policy file, read when it is first asked for.
class CalibrationFlag {
 public:
  const Calibration& get() {
    if (!calibration_) {
      calibration_ = read_calibration();
    }
    return *calibration_;
  }

 private:
  std::optional<Calibration> calibration_;
};

const std::set<std::string> kSpending = {"random", "greedy", "dp",
                                         "rl"};  // the policies that spend a budget

/// The rank policy that --attention, --rank_policy, --rank, --energy, --rank_budget, --policy and
/// --latency describe; --attention=exact is the policy "exact".
std::unique_ptr<RankPolicy> rank_policy_flags(const ModelConfig& config, const at::Device& device,
                                              CalibrationFlag& calibration) {
  const auto check_name = [](const char* option, const std::string& value) {
    check(ErrorKind::kUsage, value != "full", option, "=full is called ", option, "=exact now");
  };
  check_name("--attention", FLAGS_attention);
  check_name("--rank_policy", FLAGS_rank_policy);
  check(ErrorKind::kUsage, FLAGS_attention == "exact" || FLAGS_attention == "lowrank",
        "--attention must be exact or lowrank, got '", FLAGS_attention, "'");
  if (FLAGS_attention == "exact" || FLAGS_rank_policy == "exact") {
    return make_exact_policy();
  }
  if (FLAGS_rank_policy == "fixed") {
    return make_fixed_policy(FLAGS_rank, config.head_dim);
  }
  const auto buckets = bucket_flags(device, config.head_dim);
  if (FLAGS_rank_policy == "energy") {
    return make_energy_policy(FLAGS_energy, buckets);
  }
  check(ErrorKind::kUsage, kSpending.contains(FLAGS_rank_policy),
        "--rank_policy must be exact, fixed, energy, random, greedy, dp or rl, got '",
        FLAGS_rank_policy, "'");
  check(ErrorKind::kUsage, !FLAGS_policy.empty(), "--rank_policy=", FLAGS_rank_policy,
        " needs --policy=FILE, made by drrl-policy ",
        FLAGS_rank_policy == "rl" ? "train" : "calibrate");
  const auto latency = latency_flag(device, config.head_dim,
                                    config.num_attention_heads / config.num_key_value_heads);
  if (FLAGS_rank_policy == "dp") {
    return make_dp_policy(calibration.get(), FLAGS_rank_budget, buckets, FLAGS_basis_updates,
                          FLAGS_gates, latency);
  }
  if (FLAGS_rank_policy == "greedy") {
    return make_greedy_policy(calibration.get(), FLAGS_rank_budget, buckets, FLAGS_basis_updates,
                              latency);
  }
  if (FLAGS_rank_policy == "random") {
    return make_random_policy(calibration.get(), FLAGS_rank_budget, buckets, FLAGS_basis_updates,
                              FLAGS_seed, latency);
  }
  const Calibration& calibrated = calibration.get();
  const auto watched = watch(watchdog(), "reading the rank policy");
  return make_rl_policy(calibrated, RankAgent::load(FLAGS_policy, calibrated), FLAGS_rank_budget,
                        buckets, FLAGS_basis_updates, FLAGS_gates, latency);
}

// Where bases start from: this process's KV groups of the calibration, if one is named.
BasisOptions basis_flags(const ModelConfig& config, const IndexRange& groups,
                         const at::Device& device, CalibrationFlag& file) {
  check(ErrorKind::kUsage, FLAGS_basis_updates >= BasisOptions::kSolve,
        "--basis_updates must be at least -1, got ", FLAGS_basis_updates);
  BasisOptions options{.update_steps = FLAGS_basis_updates, .start = {}};
  if (!FLAGS_policy.empty() && FLAGS_attention == "lowrank") {
    const Calibration& calibration = file.get();
    check_calibration(calibration, config);
    if (kSpending.contains(FLAGS_rank_policy)) {
      check_geometry(calibration);
    }
    options.start = calibration.bases.narrow(1, groups.begin, groups.count).to(device);
  }
  return options;
}

}  // namespace

std::vector<std::string> attention_inputs(std::vector<std::string> inputs) {
  if (FLAGS_attention == "lowrank") {
    inputs.insert(inputs.end(), {"policy", "latency"});
  }
  return inputs;
}

AttentionSetup attention_flags(const ModelConfig& config, const Mesh& mesh,
                               const at::Device& device) {
  CalibrationFlag calibration;
  std::unique_ptr<RankPolicy> chosen = rank_policy_flags(config, device, calibration);
  if (FLAGS_drop != 0) {
    check(ErrorKind::kUsage, FLAGS_near_block % kTileKeys == 0, "--drop=", FLAGS_drop,
          " needs a --near_block of whole tiles, a multiple of ", kTileKeys, ", got ",
          FLAGS_near_block);
    chosen = make_dropping_policy(std::move(chosen), FLAGS_drop);
  }
  const std::shared_ptr<RankPolicy> policy = std::move(chosen);
  AttentionSetup setup;
  const IndexRange groups = kv_heads_of(config.num_key_value_heads, mesh.tp().size(),
                                        mesh.tp().rank());
  check(ErrorKind::kUsage, FLAGS_guard_eps >= 0 && FLAGS_guard_decay > 0 && FLAGS_guard_decay <= 1,
        "--guard_eps must not be negative and --guard_decay lie in (0, 1], got ", FLAGS_guard_eps,
        " and ", FLAGS_guard_decay);
  check(ErrorKind::kUsage, FLAGS_guard_eps == 0 || !FLAGS_policy.empty(),
        "--guard_eps=", FLAGS_guard_eps, " needs the starting bases of --policy=FILE");
  GuardOptions guard{.eps = policy->exact() ? 0 : FLAGS_guard_eps,
                     .buckets = bucket_flags(device, config.head_dim)};
  setup.controller = std::make_shared<LowRankController>(
      policy, geometry_flags(), basis_flags(config, groups, device, calibration), groups.begin,
      guard, mesh.cp(), mesh.kv());
  const auto observer = std::make_shared<ControllerObserver>(setup.controller, guard.eps,
                                                             FLAGS_guard_decay);
  roll_call(mesh.world(), "the rank policy");
  // Options and files are the same; GPUs of other kinds may choose other ranks.
  check_agreement(exchange_over(mesh.world(), mesh.world().message_device()),
                  {{"it", observer->description()}}, ErrorKind::kUsage, "rank policy");
  setup.observers = {observer};
  return setup;
}

}  // namespace drrl
