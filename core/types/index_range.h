#pragma once

#include <cstdint>

namespace drrl {

/// `count` consecutive indices (tokens, rows, heads) from `begin` on.
struct IndexRange {
  int64_t begin;
  int64_t count;
};

}  // namespace drrl
