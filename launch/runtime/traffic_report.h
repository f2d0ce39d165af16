#pragma once

#include <nlohmann/json.hpp>

#include "distributed/collectives/group.h"
#include "distributed/collectives/traffic.h"

namespace drrl {

/// What this process sent, a share of it for each of `steps`: {"sent_bytes", "exposed_ms", "sent":
/// [{"group", "operation", "calls", "sent_bytes", "exposed_ms"}..]}. times: false for CUDA, where
/// the host runs ahead and its times say nothing; they are null then.
nlohmann::ordered_json traffic_report(const Traffic::Entries& entries, double steps, bool times);

/// What each process has, an array in the order of ranks, on all of them. Collective.
nlohmann::ordered_json gathered(const nlohmann::ordered_json& own, const Group& world);

}  // namespace drrl
