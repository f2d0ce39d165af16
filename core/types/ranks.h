#pragma once

#include <compare>
#include <cstdint>
#include <limits>
#include <map>
#include <vector>

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

/// Keys of a chunk, the step in which a gate reads far pairs. An entry is exact if its low-rank
/// weight is at least `gate` times the running softmax sum of its row. The sum covers the row's own
/// block, the sinks, then its far pairs by ascending level, chunk by chunk from a pair's first key.
/// The entry's own chunk counts at low rank, earlier chunks with their exact entries. Only the row
/// itself and older tokens count, so the test is causal.
inline constexpr int64_t kGateChunk = 256;

/// Numbers 0 .. count - 1 by their key, ascending: what shares ranks shares a call. key_of(i)
/// returns the Ranks of number i.
template <typename KeyOf>
std::map<Ranks, std::vector<int64_t>> group_by_ranks(int64_t count, const KeyOf& key_of) {
  std::map<Ranks, std::vector<int64_t>> groups;
  for (int64_t i = 0; i < count; ++i) {
    groups[key_of(i)].push_back(i);
  }
  return groups;
}

}  // namespace drrl
