#pragma once

#include <ATen/ATen.h>

#include "core/block_tree.h"

namespace drrl {

/// View of `count` runs of `rows` tokens, `stride` tokens apart, the first at `begin`, of one tensor laid out by head:
/// x [B, H, L, e] -> [B, G, count, H / G, rows, e] (no copy; writes go through).
at::Tensor token_runs(const at::Tensor& x, int64_t groups, int64_t begin, int64_t count, int64_t rows, int64_t stride);

/// The keys' side of a run: x [B, G, L, e] -> [B G count, rows, e], contiguous.
at::Tensor key_rows(const at::Tensor& x, const PairRun& run);

/// The queries' side of a run, the heads of a group stacked as rows: x [B, H, L, e] -> [B G count, (H / G) rows, e], contiguous.
at::Tensor query_rows(const at::Tensor& x, int64_t groups, const PairRun& run);

/// Rows [n, rows, d] in a basis [n, d, r], and rows [n, rows, r] expanded by one; as they are if the basis is undefined, which stands for rank d.
at::Tensor into_basis(const at::Tensor& rows, const at::Tensor& basis);
at::Tensor out_of_basis(const at::Tensor& rows, const at::Tensor& basis);

}  // namespace drrl
