#pragma once

#include <vector>

#include <ATen/ATen.h>

#include "core/types/block_tree.h"

namespace drrl {

/// View of `count` runs of `rows` tokens, `stride` tokens apart, the first at `begin`, of one
/// tensor laid out by head: x [B, H, L, e] -> [B, G, count, H / G, rows, e] (no copy; writes go
/// through).
at::Tensor token_runs(const at::Tensor& x, int64_t groups, int64_t begin, int64_t count,
                      int64_t rows, int64_t stride);

/// The keys' side of a run: x [B, G, L, e] -> [B G count, rows, e], contiguous.
at::Tensor key_rows(const at::Tensor& x, const PairRun& run);

/// The queries' side of a run, the heads of a group stacked as rows: x [B, H, L, e] -> [B G count,
/// (H / G) rows, e], contiguous.
at::Tensor query_rows(const at::Tensor& x, int64_t groups, const PairRun& run);

/// Adds rows to where query_rows or key_rows took them from: x [B, H, L, e] += added [B G count, (H
/// / G) rows, e], each times its weight [B G count, (H / G) rows] (undefined: one). `begin` and
/// `rows` are those of the run's queries, or with groups = H those of its keys.
void add_rows(const at::Tensor& x, int64_t groups, const PairRun& run, int64_t begin, int64_t rows,
              const at::Tensor& added, const at::Tensor& weights = {});

/// x [a, b, c, rows, e] as a contiguous tensor, and the other way round x <- packed, contiguous and
/// of as many numbers. On CUDA faster than ATen's copies.
at::Tensor packed(const at::Tensor& x);
void unpack(const at::Tensor& packed, const at::Tensor& x);

/// Numbers, int64_t or double, on a device. To CUDA without waiting for it.
template <typename T>
at::Tensor on_device(const std::vector<T>& numbers, at::Device device);

/// Rows [n, rows, d] in a basis [n, d, r], and rows [n, rows, r] expanded by one; as they are if
/// the basis is undefined, which stands for rank d.
at::Tensor into_basis(const at::Tensor& rows, const at::Tensor& basis);
at::Tensor out_of_basis(const at::Tensor& rows, const at::Tensor& basis);

/// a b of batches [n, .., m] and [n, m, ..], in float for half precision: rounded to bfloat16, a
/// score of 20 would make its weight wrong by up to 6 %.
at::Tensor wide_product(const at::Tensor& a, const at::Tensor& b);

}  // namespace drrl
