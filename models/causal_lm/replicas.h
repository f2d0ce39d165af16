#pragma once

#include "distributed/topology/mesh.h"
#include "models/causal_lm/causal_lm.h"

namespace drrl {

/// Checks that processes that hold the same weights hold the same bits: data- and context-parallel
/// copies of a shard, tensor-parallel processes what is not sharded, and those that share a KV head
/// its rows. Collective over the world. Errors, on all alike: Error(kCommunication) that names who
/// differs.
void check_replicas(const CausalLM& model, const Mesh& mesh);

}  // namespace drrl
