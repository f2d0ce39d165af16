#pragma once

#include <filesystem>
#include <memory>

#include "distributed/topology/environment.h"
#include "launch/options/policy_flags.h"
#include "policy/online/online_policy.h"

namespace drrl {

/// Online training of that policy as --policy_update_every and --policy_sample_rows say, and its
/// hooks; null if they say none. Collective over the world. Errors: Error(kUsage) for policies that
/// do not decide by calibrated damages, and under --cp.
std::shared_ptr<OnlinePolicy> online_policy_flags(const Environment& environment,
                                                  const ModelConfig& config, const Mesh& mesh,
                                                  const at::Device& device, int64_t tokens_per_step,
                                                  AttentionSetup& attention);

/// Writes the policy file that online training has made of --policy.
void save_online_policy(const OnlinePolicy& policy, const std::filesystem::path& file);

}  // namespace drrl
