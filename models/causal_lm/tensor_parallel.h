#pragma once

#include <optional>

#include <ATen/ATen.h>

#include "distributed/topology/mesh.h"
#include "models/causal_lm/config.h"

namespace drrl {

/// Megatron's pair of linear layers (arXiv 1909.08053): one all-reduce each, in the forward of the
/// row-parallel one and in the backward of the column-parallel one. x and the results are [N,
/// features] in the dtype of the activations; weights and biases are this rank's fp32 (fp64 with
/// fp64) shards, leaves, cast to the dtype of x for the product; their gradients are added in place
/// (gradients.h).
///
/// Columns: x (the same on all ranks) [N, in], weight [out_local, in], bias [out_local] -> x
/// weight^T + bias [N, out_local].
at::Tensor column_parallel_linear(const at::Tensor& x, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias, const Group& tp);

/// Rows: x [N, in_local] (kSwiglu: [gate | up], [N, 2 in_local]), weight [out, in_local], bias
/// [out] and residual [N, out] (the same on all ranks and added once)
/// -> residual + sum over ranks of activation(x) weight^T + bias [N, out], the same on all ranks.
/// activation(x) is computed once more in the backward pass instead of being kept; none: the
/// identity.
at::Tensor row_parallel_linear(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& residual,
                               const Group& tp,
                               std::optional<Activation> activation = std::nullopt);

/// tokens [N] int64 (checked by the caller) -> rows of the table in `dtype`, [N, hidden], the same
/// on all ranks. weight [rows_local, hidden] holds the vocabulary rows from `first_row` on.
at::Tensor vocabulary_parallel_embedding(const at::Tensor& tokens, const at::Tensor& weight,
                                         int64_t first_row, at::ScalarType dtype, const Group& tp);

}  // namespace drrl
