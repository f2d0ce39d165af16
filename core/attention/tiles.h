#pragma once

#include <vector>

#include <ATen/ATen.h>

#include "core/types/block_tree.h"

namespace drrl {

/// Which rows keep which tiles (kTileRows), [.., rows, tiles] bool, by which need them; row 0
/// begins a block of `block_rows` rows, a multiple of kTileRows.
at::Tensor kept_tiles(const at::Tensor& needed, int64_t block_rows);

/// The first row of each tile of rows that keeps a tile of keys, kTileRows if none does: kept [..,
/// rows, tiles] bool -> [.., tiles of rows, tiles] uint8.
at::Tensor first_kept(const at::Tensor& kept);

/// Share of each far pair's tiles that some of their rows keep, over the heads of a KV group: [B G
/// pairs], 1 for pairs that drop none. kept_from: FarServed's; empty if it is undefined.
std::vector<double> kept_shares(const at::Tensor& kept_from, const BlockTree& tree, int64_t groups);

}  // namespace drrl
