#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "distributed/collectives/group.h"

namespace drrl {

/// True when drrl was built with CUDA and NCCL. Says nothing about this machine.
bool built_with_nccl() noexcept;

/// Errors: Error(kUsage) when drrl was built without CUDA, when this machine has no usable GPU, or
/// when `device` is none of its GPUs.
void require_nccl(at::Device device);

/// Joins the NCCL group of `world_ranks` as the member with `world_rank`: a Group for tensors on
/// `device`, and beside them for CPU tensors where `cpu` is given, a group of the same processes in
/// the same order. Members find each other in `store` under `name` and their first rank, so groups
/// of one name that share no process may be made at the same time. NCCL connects at the first
/// collective. NCCL's watchdog enforces `timeout`: it ends the process, naming rank and collective.
///
/// Errors: as require_nccl; Error(kCommunication) when the group cannot be made.
Group make_nccl_group(const std::string& name, const c10::intrusive_ptr<c10d::Store>& store,
                      std::vector<int64_t> world_ranks, int64_t world_rank, at::Device device,
                      std::chrono::milliseconds timeout, const Group& cpu = {});

}  // namespace drrl
