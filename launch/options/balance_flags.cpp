#include "launch/options/balance_flags.h"

#include <cmath>
#include <cstdlib>

#include <gflags/gflags.h>

#include "core/error.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "models/causal_lm/tensor_parallel.h"
#include "policy/attention/lowrank_controller.h"

DEFINE_double(balance_damage, 0.005,
              "calibrated damage that balance may add to that of --rank_budget; 0.005 is half a "
              "percent of perplexity [nats/token]");

namespace drrl {
namespace {

RankBalance rank_balance(const char* flag, int64_t processes, const ModelConfig& config,
                         const at::Device& device) {
  check(ErrorKind::kUsage, FLAGS_attention == "lowrank" && FLAGS_rank_policy == "dp", flag,
        " needs --attention=lowrank and --rank_policy=dp, got ", FLAGS_attention, " and ",
        FLAGS_rank_policy);
  check(ErrorKind::kUsage, FLAGS_balance_damage >= 0, "--balance_damage must not be negative, got ",
        FLAGS_balance_damage);
  std::vector<int64_t> groups;
  for (int64_t p = 0; p < processes; ++p) {
    groups.push_back(partition(config.num_key_value_heads, processes, p).count);
  }
  const int64_t heads_per_group = config.num_attention_heads / config.num_key_value_heads;
  return {read_calibration(),
          BlockTree(FLAGS_seq_len, geometry_flags()),
          heads_per_group,
          std::move(groups),
          {.budget = FLAGS_rank_budget,
           .buckets = bucket_flags(device, config.head_dim),
           .update_steps = FLAGS_basis_updates,
           .with_gates = FLAGS_gates,
           .latency = latency_flag(device, config.head_dim, heads_per_group),
           .damage = FLAGS_balance_damage}};
}

}  // namespace

void balance_for_speeds(const std::string& text, const ModelConfig& config,
                        const at::Device& device, LowRankController& controller) {
  std::vector<double> speeds;
  for (const std::string& item : split(text, ',')) {
    char* end = nullptr;
    speeds.push_back(std::strtod(item.c_str(), &end));
    check(ErrorKind::kUsage, *end == '\0' && speeds.back() > 0 && std::isfinite(speeds.back()),
          "--balance_speeds=", text, ": '", item, "' is not a positive number");
  }
  const auto processes = static_cast<int64_t>(speeds.size());
  check(ErrorKind::kUsage, processes <= config.num_key_value_heads, "--balance_speeds=", text,
        " is of ", processes, " tensor-parallel processes, ", FLAGS_model, " has ",
        config.num_key_value_heads, " KV groups");
  const RankBalance balance = rank_balance("--balance_speeds", processes, config, device);
  controller.set_policy(
      make_table_policy(balance.ranks(speeds).table,
                        c10::str(controller.policy()->describe(), ", balanced for speeds ", text,
                                 " within ", FLAGS_balance_damage, " nats")));
}

std::shared_ptr<OnlineBalance> online_balance(int64_t every, const ModelConfig& config,
                                              const Mesh& mesh, const at::Device& device,
                                              AttentionSetup& attention) {
  if (every == 0) {
    return nullptr;
  }
  check(ErrorKind::kUsage, mesh.cp().size() == 1, "--balance_every=", every,
        " does not go with --cp=", mesh.cp().size(),
        ": processes that share a sequence must decide alike, and each tensor-parallel group "
        "measures its own speeds");
  check_whole_groups("--balance_every", mesh.tp().size(), config);
  check(ErrorKind::kUsage, attention.observers.size() == 1,
        "--balance_every does not go with --policy_update_every: each decides the ranks");
  auto balance = std::make_shared<OnlineBalance>(
      attention.controller, rank_balance("--balance_every", mesh.tp().size(), config, device),
      mesh.tp(), every, device.is_cpu());
  attention.observers.push_back(balance);
  return balance;
}

}  // namespace drrl
