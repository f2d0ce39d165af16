#include "core/attention/tiles.h"

#include "core/types/lowrank_plan.h"
#include "core/types/ranks.h"

namespace drrl {
namespace {

// [.., rows, tiles] -> [.., tiles of rows, kTileRows, tiles], missing rows false.
at::Tensor by_row_tile(const at::Tensor& x) {
  const int64_t missing = (kTileRows - x.size(-2) % kTileRows) % kTileRows;
  const auto whole = missing > 0 ? at::constant_pad_nd(x, {0, 0, 0, missing}) : x;
  return whole.unflatten(-2, {whole.size(-2) / kTileRows, kTileRows});
}

}  // namespace

at::Tensor kept_tiles(const at::Tensor& needed, int64_t block_rows) {
  TORCH_CHECK(block_rows % kTileRows == 0, "kept_tiles: blocks of ", block_rows,
              " rows, expected a multiple of ", kTileRows);
  const auto tiles = by_row_tile(needed);
  const auto by_any = tiles.any(-2);  // [.., tiles of rows, tiles]
  auto before = at::constant_pad_nd(by_any, {0, 0, 1, 0}).narrow(-2, 0, by_any.size(-2));
  const int64_t in_block = block_rows / kTileRows;
  for (int64_t first = 0; first < before.size(-2); first += in_block) {
    before.select(-2, first).fill_(false);  // another block
  }
  const auto earlier = tiles.cumsum(-2) > 0;  // the row or one before it
  return earlier.logical_or(before.unsqueeze(-2)).flatten(-3, -2).narrow(-2, 0, needed.size(-2));
}

at::Tensor first_kept(const at::Tensor& kept) {
  return by_row_tile(kept).logical_not().to(at::kByte).cumprod(-2).sum(-2, false, at::kByte);
}

std::vector<double> kept_shares(const at::Tensor& kept_from, const BlockTree& tree,
                                int64_t groups) {
  if (!kept_from.defined()) {
    return {};
  }
  const auto tiles = kept_from.unflatten(1, {groups, -1}).flatten(0, 1);  // [B G, g, rows, keys]
  // Sums over all tiles above and to the left, by KV group: tiles that are kept, and all.
  const auto sums_of = [](const at::Tensor& x) {
    return at::constant_pad_nd(x.sum(1, false, at::kInt), {1, 0, 1, 0})
        .cumsum(1, at::kInt)
        .cumsum(2, at::kInt)
        .contiguous();
  };
  const auto kept = sums_of(tiles < kTileRows), all = sums_of(tiles != FarServed::kNoTile);
  std::vector<double> shares;
  for (int64_t sequence = 0; sequence < tiles.size(0); ++sequence) {
    for (const PairRun& run : tree.runs()) {
      for (int64_t i = 0; i < run.count; ++i) {
        const int64_t query = run.query_begin + i * run.stride - tree.sinks(),
                      key = run.key_begin + i * run.stride - tree.sinks();
        const int64_t top = query / kTileRows,
                      bottom = (query + run.query_rows + kTileRows - 1) / kTileRows,
                      left = key / kTileKeys, right = (key + run.key_rows) / kTileKeys;
        const auto count = [&](const at::Tensor& sums) {
          const auto at = sums.accessor<int32_t, 3>()[sequence];
          return at[bottom][right] - at[top][right] - at[bottom][left] + at[top][left];
        };
        const int32_t tiles_here = count(all);
        shares.push_back(tiles_here > 0 ? static_cast<double>(count(kept)) / tiles_here : 1);
      }
    }
  }
  return shares;
}

}  // namespace drrl
