#include "launch/policy_flags.h"

#include "core/error.h"
#include "distributed/agreement.h"
#include "launch/flags.h"
#include "policy/calibration.h"

namespace drrl {

Geometry geometry_flags() {
  check(ErrorKind::kUsage, FLAGS_near_block >= 1, "--near_block must be at least 1, got ", FLAGS_near_block);
  check(ErrorKind::kUsage, FLAGS_sink_tokens >= 0, "--sink_tokens must not be negative, got ", FLAGS_sink_tokens);
  return {FLAGS_near_block, FLAGS_sink_tokens};
}

std::shared_ptr<RankPolicy> rank_policy_flags(const ModelConfig& config, const at::Device& device) {
  check(ErrorKind::kUsage, FLAGS_attention == "full" || FLAGS_attention == "lowrank", "--attention must be full or lowrank, got '",
        FLAGS_attention, "'");
  if (FLAGS_attention == "full" || FLAGS_rank_policy == "full") {
    return make_full_policy();
  }
  if (FLAGS_rank_policy == "fixed") {
    return make_fixed_policy(FLAGS_rank, config.head_dim);
  }
  const auto buckets = rank_buckets(device, config.head_dim);
  if (FLAGS_rank_policy == "energy") {
    return make_energy_policy(FLAGS_energy, buckets);
  }
  check(ErrorKind::kUsage, FLAGS_rank_policy == "dp", "--rank_policy must be full, fixed, energy or dp, got '", FLAGS_rank_policy, "'");
  check(ErrorKind::kUsage, !FLAGS_policy.empty(), "--rank_policy=dp needs --policy=FILE, made by drrl-policy calibrate");
  return make_dp_policy(Calibration::load(FLAGS_policy), FLAGS_rank_budget, config.num_hidden_layers, config.head_dim, buckets);
}

AttentionSetup attention_flags(const ModelConfig& config, const Mesh& mesh, const at::Device& device) {
  const std::shared_ptr<RankPolicy> policy = rank_policy_flags(config, device);
  check_agreement(mesh.world(), hash_bytes(policy->describe()), "the rank policy");
  AttentionSetup setup;
  setup.controller = std::make_shared<LowRankController>(policy, geometry_flags());
  const auto controller = setup.controller;
  setup.hooks.begin_step = [controller](int64_t) { controller->take_statistics(); };
  setup.hooks.end_step = [controller]() { return controller->take_statistics(); };
  // Bases are made anew from each sequence, so a resumed run needs no more than the same decisions.
  setup.hooks.save = [controller]() { return controller->policy()->describe(); };
  setup.hooks.load = [controller](const std::string& saved) {
    check(ErrorKind::kCheckpoint, saved == controller->policy()->describe(), "the checkpoint was written under the rank policy '", saved,
          "', this run has '", controller->policy()->describe(), "'");
  };
  return setup;
}

}  // namespace drrl
