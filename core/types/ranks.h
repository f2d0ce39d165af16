#pragma once

#include <compare>
#include <cstdint>
#include <limits>

namespace drrl {

/// The widths at which a far pair is attended: `qk` columns for scores, `v` for values; each
/// in 1..d, d meaning exact.
struct Ranks {
  int64_t qk;
  int64_t v;
  /// An entry (query row, key) of the pair whose weight at low rank is at least this share of the
  /// row's softmax so far (below) is exact after all, score and value; infinity: none is.
  float gate = std::numeric_limits<float>::infinity();

  bool gated(int64_t d) const {
    return gate < std::numeric_limits<float>::infinity() && (qk < d || v < d);
  }

  bool operator==(const Ranks&) const = default;
  auto operator<=>(const Ranks&) const = default;
};

/// A row's softmax so far, where a gate looks: the weights of its own block, the sinks, and of its
/// far pairs by ascending level in chunks of so many keys from the pair's first on, the entry's own
/// chunk at low rank, earlier chunks with what was exact in them. Of the row itself and older
/// tokens alone, so causal row by row.
inline constexpr int64_t kGateChunk = 256;

}  // namespace drrl
