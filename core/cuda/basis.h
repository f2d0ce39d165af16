#pragma once

#include "core/basis.h"
#include "core/update_settings.h"

namespace drrl {

/// update_basis on CUDA by one kernel instead of dozens of batched calls. False, and nothing said, where sizes do not fit it (d is to be a multiple of 4,
/// the rank of 8): then the caller goes the long way. Does not wait for the device: where a Gram is not finite or a factorization failed for every
/// jitter the bases are NaN, and the first later call that knows of it throws Error(kNumerics).
bool update_basis_cuda(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y, int64_t steps, const UpdateSettings& settings,
                       Basis& result);

/// residual_factor likewise; start [d, columns] float64: the fixed random columns.
bool residual_factor_cuda(const Basis& basis, const at::Tensor& gram, const at::Tensor& keys, const at::Tensor& start, at::Tensor& factor);

}  // namespace drrl
