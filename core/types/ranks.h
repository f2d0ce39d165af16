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

  /// A tile of the pair (kTileRows x kTileKeys) is dropped for rows that do not keep it (below), if
  /// no low-rank weight in it is at least this share of a row's softmax so far; 0: none is dropped.
  float drop = 0;

  bool drops() const { return drop > 0; }
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

/// Tiles of the far field: rows of one head x keys, counted from the first token after the sinks,
/// so that blocks of a multiple of kTileKeys tokens are whole tiles.
///
/// A row needs a tile if an entry of it weighs at least `drop` times the row's softmax so far: that
/// before the chunk of keys (kGateChunk) which holds the tile. A row keeps a tile if it needs it,
/// or an earlier row of the same tile of rows does, or any row of the tile of rows before, in the
/// same block. So what a row keeps depends on itself and older tokens alone. What a row does not
/// keep has no weight.
inline constexpr int64_t kTileRows = 16, kTileKeys = 64;

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
