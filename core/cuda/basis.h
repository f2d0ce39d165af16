#pragma once

#include "core/types/basis.h"
#include "core/types/basis_settings.h"

namespace drrl {

/// update_bases on CUDA, of the items whose rank is at most `columns`, those of the result: one
/// kernel instead of dozens of batched calls for each rank. False, and nothing said, where sizes do
/// not fit it (d is to be a multiple of 4, ranks of 8): then the caller goes the long way. Does not
/// wait for the device: where a Gram is not finite or a factorization failed for every jitter the
/// bases are NaN, and the first later call that knows of it throws Error(kNumerics).
bool update_bases_cuda(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y,
                       const std::vector<int64_t>& ranks, int64_t columns, int64_t steps,
                       const UpdateSettings& settings, Basis& result);

/// residual_factor likewise, of the items whose rank is at most that of the basis; start [d,
/// columns] float64: the fixed random columns.
bool residual_factor_cuda(const Basis& basis, const at::Tensor& gram, const at::Tensor& keys,
                          const std::vector<int64_t>& ranks, const at::Tensor& start,
                          at::Tensor& factor);

}  // namespace drrl
