#pragma once

#include <cuda_runtime_api.h>
#include <cusolverDn.h>

#include "core/error.h"

namespace drrl::cuda {

/// Name of a cuSOLVER status, which the library itself does not offer.
const char* name(cusolverStatus_t status) noexcept;

}  // namespace drrl::cuda

/// Throws Error(kInternal) with the call, its status by name and the place unless the call
/// succeeded.
#define DRRL_CHECK_CUDA(call)                                                                     \
  do {                                                                                            \
    const cudaError_t drrl_status_ = (call);                                                      \
    ::drrl::check(::drrl::ErrorKind::kInternal, drrl_status_ == cudaSuccess, #call, " returned ", \
                  cudaGetErrorName(drrl_status_), ": ", cudaGetErrorString(drrl_status_), " at ", \
                  __FILE__, ":", __LINE__);                                                       \
  } while (false)

#define DRRL_CHECK_CUSOLVER(call)                                                               \
  do {                                                                                          \
    const cusolverStatus_t drrl_status_ = (call);                                               \
    ::drrl::check(::drrl::ErrorKind::kInternal, drrl_status_ == CUSOLVER_STATUS_SUCCESS, #call, \
                  " returned ", ::drrl::cuda::name(drrl_status_), " at ", __FILE__, ":",        \
                  __LINE__);                                                                    \
  } while (false)
