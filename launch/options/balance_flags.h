#pragma once

#include <memory>
#include <string>

#include "distributed/topology/mesh.h"
#include "launch/options/policy_flags.h"
#include "policy/online/online_balance.h"

namespace drrl {

/// Has the controller use the ranks that --balance_damage allows for tensor-parallel processes of
/// these speeds, a comma list (drrl-eval --balance_speeds): they say how KV groups are dealt out,
/// whatever this job's --tp is. Errors: Error(kUsage) for other policies than dp, more speeds than
/// KV groups, or such as are not positive.
void balance_for_speeds(const std::string& speeds, const ModelConfig& config,
                        const at::Device& device, LowRankController& controller);

/// Balance by measured speeds, every so many steps (drrl-train --balance_every), and its hooks;
/// null for 0. Errors: Error(kUsage) for other policies than dp, with --policy_update_every, and
/// under --cp.
std::shared_ptr<OnlineBalance> online_balance(int64_t every, const ModelConfig& config,
                                              const Mesh& mesh, const at::Device& device,
                                              AttentionSetup& attention);

}  // namespace drrl
