#include "launch/options/online_flags.h"

#include <chrono>

#include <gflags/gflags.h>

#include "core/error.h"
#include "launch/options/flags.h"
#include "models/causal_lm/tensor_parallel.h"
#include "policy/agent/agent.h"
#include "policy/allocation/allocation.h"

DEFINE_int64(policy_update_every, 0,
             "train the rank policy (dp or rl) along with the model, and update it so often; an "
             "update takes effect as many steps later; 0: never [steps]");
DEFINE_int64(policy_sample_rows, 32,
             "query rows, of each layer in every fourth microbatch, on which --policy_update_every "
             "measures what every rank would do [rows]");

namespace drrl {

std::shared_ptr<OnlinePolicy> online_policy_flags(const Environment& environment,
                                                  const ModelConfig& config, const Mesh& mesh,
                                                  const at::Device& device, int64_t tokens_per_step,
                                                  AttentionSetup& attention) {
  check(ErrorKind::kUsage, FLAGS_policy_update_every >= 0 && FLAGS_policy_sample_rows >= 1,
        "--policy_update_every must not be negative and --policy_sample_rows at least 1, got ",
        FLAGS_policy_update_every, " and ", FLAGS_policy_sample_rows);
  if (FLAGS_policy_update_every == 0) {
    return nullptr;
  }
  check(ErrorKind::kUsage,
        FLAGS_attention == "lowrank" && (FLAGS_rank_policy == "dp" || FLAGS_rank_policy == "rl"),
        "--policy_update_every=", FLAGS_policy_update_every,
        " needs --attention=lowrank and --rank_policy=dp or rl, got ", FLAGS_attention, " and ",
        FLAGS_rank_policy);
  check_whole_groups("--policy_update_every", mesh.tp().size(), config);
  const IndexRange groups = kv_heads_of(config.num_key_value_heads, mesh.tp().size(),
                                        mesh.tp().rank());
  const auto buckets = bucket_flags(device, config.head_dim);
  OnlinePolicy::Options options;
  options.update_every = FLAGS_policy_update_every;
  options.sampling = {.rows = FLAGS_policy_sample_rows,
                      .seed = FLAGS_seed,
                      .gradient_scale = static_cast<double>(tokens_per_step),
                      .update_steps = FLAGS_basis_updates,
                      .buckets = buckets};
  if (FLAGS_rank_policy == "dp") {
    const int64_t heads_per_group = config.num_attention_heads / config.num_key_value_heads;
    options.allocate = [tree = BlockTree(FLAGS_seq_len, geometry_flags()), heads_per_group, buckets,
                        latency = latency_flag(device, config.head_dim, heads_per_group)](
                           const Calibration& calibration) {
      return allocate(calibration, tree,
                      {.budget = FLAGS_rank_budget,
                       .heads_per_group = heads_per_group,
                       .buckets = buckets,
                       .update_steps = FLAGS_basis_updates,
                       .with_gates = FLAGS_gates,
                       .latency = latency.get()})
          .table;
    };
  }
  Group channel = create_world_group("policy", environment, device,
                                     std::chrono::seconds(FLAGS_timeout_s));
  channel.watch(mesh.world().watchdog());
  channel.count(mesh.world().traffic());
  auto online = std::make_shared<OnlinePolicy>(attention.controller, read_calibration(),
                                               groups.begin, groups.count, device,
                                               std::move(channel), std::move(options));
  attention.observers.push_back(online);
  return online;
}

void save_online_policy(const OnlinePolicy& policy, const std::filesystem::path& file) {
  Calibration calibration = policy.calibration();
  calibration.data += c10::str(", then ", policy.updates(), " online updates on ", FLAGS_data);
  if (FLAGS_rank_policy == "rl") {
    RankAgent::load(FLAGS_policy, calibration).save(file, calibration);
  } else {
    calibration.save(file);
  }
}

}  // namespace drrl
