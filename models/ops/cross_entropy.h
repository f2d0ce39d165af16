#pragma once

#include <ATen/ATen.h>

#include "distributed/collectives/group.h"

namespace drrl {

/// The output head and its cross entropy in one, vocabulary-parallel and in chunks of rows, so that
/// logits exist for `chunk_rows` tokens at a time and never as a whole [N, vocabulary] matrix. As
/// in Liger Kernel (arXiv 2410.10989), gradients are computed in the same sweep, while the chunk's
/// probabilities are at hand: a second product with the head is never needed.
///
///   x       [N, hidden], the same on all ranks
///   weight  [rows_local, hidden], the vocabulary rows from `first_row` on
///   labels  [N] int64, of which kIgnoredLabel (causal_lm.h) does not count; others are in
///           [0, vocabulary), checked by the caller
///   loss    sum over counted rows of logsumexp(x_i W^T) - x_i W^T[label_i], scalar fp32 (fp64 with
///           fp64), the same on all ranks
///
/// Backward yields loss_scale times the gradient: d_x is returned to autograd, d_weight added to
/// weight.grad in place (gradients.h). Products run in the dtype of x, softmax and sums in fp32.
/// Two all-reduces of a few floats a row for the softmax and one of d_x. It can be run once.
at::Tensor fused_linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& labels, int64_t first_row,
                                      double loss_scale, int64_t chunk_rows, const Group& tp);

/// The loss of each row [N] fp32 (fp64 with fp64), 0 where ignored. No gradient.
at::Tensor linear_cross_entropy_rows(const at::Tensor& x, const at::Tensor& weight,
                                     const at::Tensor& labels, int64_t first_row,
                                     int64_t chunk_rows, const Group& tp);

}  // namespace drrl
