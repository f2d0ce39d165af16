#pragma once

#include <chrono>

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "distributed/collectives/agreement.h"
#include "distributed/collectives/group.h"
#include "distributed/topology/environment.h"

namespace drrl {

/// The key-value store through which NCCL groups find each other.
///
/// Under torchrun, a client of the store at MASTER_ADDR:MASTER_PORT, which the agent serves (or
/// rank 0, when the agent does not); keys are kept apart by restart count. Otherwise rank 0 serves
/// one on a port that the system picks and tells the others over `bootstrap`, the world over MPI:
/// on the loopback address when all are on one node, else on `master_address` or its host name.
///
/// Collective over the world. Errors: Error(kCommunication) naming the address when it cannot be
/// reached within `timeout`.
c10::intrusive_ptr<c10d::Store> make_store(const Environment& environment, const Group& bootstrap,
                                           std::chrono::milliseconds timeout);

/// The exchange between all processes of a store, which need no groups yet: through rank 0. `name`
/// keeps the keys of one apart from those of another. Collective. Errors: Error(kUsage) where two
/// processes have the same rank, or a process was told of another world size than one before it;
/// Error(kCommunication) when somebody does not come within the store's timeout.
TextExchange exchange_over(const c10::intrusive_ptr<c10d::Store>& store, const std::string& name,
                           const Environment& environment);

}  // namespace drrl
