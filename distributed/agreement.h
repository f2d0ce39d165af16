#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "distributed/group.h"

namespace drrl {

/// 64-bit hash (XXH3) of bytes; equal on all machines of one byte order.
uint64_t hash_bytes(const void* data, std::size_t size);
inline uint64_t hash_bytes(std::string_view text) {
  return hash_bytes(text.data(), text.size());
}

/// Waits until all members of `group` have come here, to `what`. Collective. Errors: Error(kCommunication), which on member 0 names a member that has not come within
/// the group's timeout. On GPUs nothing: messages between two members would take communicators of their own.
void roll_call(const Group& group, std::string_view what);

/// Checks that all members of `group` hold the same `value` (of `what`, for the message: "rank decisions of step 12").
/// Collective; moves 8 bytes a member. Errors, on all members alike: Error(kCommunication) naming the members that differ from
/// the majority, or from rank 0 when there is none.
void check_agreement(const Group& group, uint64_t value, std::string_view what);

}  // namespace drrl
