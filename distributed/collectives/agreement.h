#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/ATen.h>

#include "core/error.h"
#include "distributed/collectives/group.h"

namespace drrl {

/// 64-bit hash (XXH3) of bytes; equal on all machines of one byte order.
uint64_t hash_bytes(const void* data, std::size_t size);
inline uint64_t hash_bytes(std::string_view text) {
  return hash_bytes(text.data(), text.size());
}

/// Waits until all members of `group` have come here, to `what`. Collective. Errors:
/// Error(kCommunication), which on member 0 names a member that has not come within the group's
/// timeout. On GPUs nothing: messages between two members would take communicators of their own.
void roll_call(const Group& group, std::string_view what);

/// Checks that all members of `group` hold the same `value` (of `what`, for the message: "rank
/// decisions of step 12"). Collective; moves 8 bytes a member. Errors, on all members alike:
/// Error(kCommunication) naming the members that differ from the majority, or from rank 0 when
/// there is none.
void check_agreement(const Group& group, uint64_t value, std::string_view what);

/// All-gather of texts: every rank hands in one and gets all of them, in rank order. Collective.
using TextExchange = std::function<std::vector<std::string>(const std::string&)>;

/// The exchange over `group`; `device` is where the group's tensors live (CUDA for NCCL).
TextExchange exchange_over(const Group& group, at::Device device = at::kCPU);

/// What a process was given and others should have been given alike: an option, the contents of a
/// file.
struct Fact {
  std::string name;
  std::string value;
  std::string origin = {};  ///< where this process has it from, a path for example: it may differ,
                            ///< and stands in messages
};
using Facts = std::vector<Fact>;

/// How the facts of processes, in rank order, differ: "--lr is 0.1 on rank 0, 0.2 on ranks 1 2";
/// empty if they do not. One line. Processes that do not hold a fact of some name are not asked
/// about it.
std::string disagreement(const std::vector<Facts>& all);

/// Checks that all processes of `exchange` hold the same facts. Collective; moves 16 bytes a
/// process if they are all the same. Errors, on all alike: Error(kind) that says of `what` how they
/// differ.
void check_agreement(const TextExchange& exchange, const Facts& facts, ErrorKind kind,
                     std::string_view what);

}  // namespace drrl
