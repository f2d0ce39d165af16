// Batched symmetric eigenproblems by cusolverDnXsyevBatched on the current stream. at::linalg_eigh
// loops over the matrices of a batch for d > 32 before torch 2.12, 30 to 70 times slower.

#include <map>
#include <memory>

#include <ATen/ATen.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "core/cuda/check.h"
#include "core/linalg/eigensolver.h"

namespace drrl {
namespace cuda {

const char* name(cusolverStatus_t status) noexcept {
  switch (status) {
    case CUSOLVER_STATUS_SUCCESS: return "CUSOLVER_STATUS_SUCCESS";
    case CUSOLVER_STATUS_NOT_INITIALIZED: return "CUSOLVER_STATUS_NOT_INITIALIZED";
    case CUSOLVER_STATUS_ALLOC_FAILED: return "CUSOLVER_STATUS_ALLOC_FAILED";
    case CUSOLVER_STATUS_INVALID_VALUE: return "CUSOLVER_STATUS_INVALID_VALUE";
    case CUSOLVER_STATUS_ARCH_MISMATCH: return "CUSOLVER_STATUS_ARCH_MISMATCH";
    case CUSOLVER_STATUS_EXECUTION_FAILED: return "CUSOLVER_STATUS_EXECUTION_FAILED";
    case CUSOLVER_STATUS_INTERNAL_ERROR: return "CUSOLVER_STATUS_INTERNAL_ERROR";
    case CUSOLVER_STATUS_MATRIX_TYPE_NOT_SUPPORTED:
      return "CUSOLVER_STATUS_MATRIX_TYPE_NOT_SUPPORTED";
    case CUSOLVER_STATUS_NOT_SUPPORTED: return "CUSOLVER_STATUS_NOT_SUPPORTED";
    default: return "an unnamed cuSOLVER status";
  }
}

namespace {

constexpr int64_t
    kLargestBatch = 16384;  // the solver's workspace and its 32-bit indices stay small

struct ParamsDeleter {
  void operator()(cusolverDnParams* params) const noexcept { cusolverDnDestroyParams(params); }
};
using Params = std::unique_ptr<cusolverDnParams, ParamsDeleter>;

Params make_params() {
  cusolverDnParams_t raw = nullptr;
  DRRL_CHECK_CUSOLVER(cusolverDnCreateParams(&raw));
  return Params(raw);
}

// The handle of this thread for the current device, bound to the current stream. ATen has such a
// pool too, but in a library that it loads only when first needed, so it cannot be linked against.
// Never destroyed: at exit CUDA may be gone before it.
cusolverDnHandle_t current_handle() {
  thread_local std::map<c10::DeviceIndex, cusolverDnHandle_t> handles;
  cusolverDnHandle_t& handle = handles[c10::cuda::current_device()];
  if (handle == nullptr) {
    DRRL_CHECK_CUSOLVER(cusolverDnCreate(&handle));
  }
  DRRL_CHECK_CUSOLVER(cusolverDnSetStream(handle, c10::cuda::getCurrentCUDAStream()));
  return handle;
}

// In place: `vectors` holds the matrices on entry and, as cuSOLVER is column-major, the
// eigenvectors as rows on return.
void solve_chunk(cusolverDnHandle_t handle, at::Tensor vectors, at::Tensor values,
                 at::Tensor info) {
  const int64_t d = vectors.size(1);
  const int64_t batch = vectors.size(0);
  const cudaDataType type = vectors.scalar_type() == at::kDouble ? CUDA_R_64F : CUDA_R_32F;
  const Params params = make_params();
  size_t device_bytes = 0;
  size_t host_bytes = 0;
  DRRL_CHECK_CUSOLVER(cusolverDnXsyevBatched_bufferSize(
      handle, params.get(), CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, d, type,
      vectors.data_ptr(), d, type, values.data_ptr(), type, &device_bytes, &host_bytes, batch));
  auto device_workspace = at::empty({static_cast<int64_t>(device_bytes)},
                                    vectors.options().dtype(at::kByte));
  std::vector<uint8_t> host_workspace(host_bytes);
  DRRL_CHECK_CUSOLVER(cusolverDnXsyevBatched(
      handle, params.get(), CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, d, type,
      vectors.data_ptr(), d, type, values.data_ptr(), type, device_workspace.data_ptr(),
      device_bytes, host_workspace.data(), host_bytes, info.data_ptr<int>(), batch));
}

}  // namespace
}  // namespace cuda

std::tuple<at::Tensor, at::Tensor> batched_eigh_cuda(const at::Tensor& matrices) {
  TORCH_CHECK(matrices.is_cuda() &&
                  (matrices.scalar_type() == at::kFloat || matrices.scalar_type() == at::kDouble),
              "batched_eigh_cuda: ", matrices.toString(), ", expected float32 or float64 on CUDA");
  const c10::cuda::CUDAGuard on_device(matrices.device());
  const int64_t n = matrices.size(0);
  auto vectors = matrices.clone(at::MemoryFormat::Contiguous);
  auto values = at::empty({n, matrices.size(1)}, matrices.options());
  auto info = at::zeros({n}, matrices.options().dtype(at::kInt));
  const cusolverDnHandle_t handle = cuda::current_handle();
  for (int64_t begin = 0; begin < n; begin += cuda::kLargestBatch) {
    const int64_t end = std::min(n, begin + cuda::kLargestBatch);
    cuda::solve_chunk(handle, vectors.slice(0, begin, end), values.slice(0, begin, end),
                      info.slice(0, begin, end));
  }
  const auto failed = info.nonzero();
  check(ErrorKind::kNumerics, failed.numel() == 0, "batched_eigh: matrix ",
        failed.numel() == 0 ? 0 : failed[0].item<int64_t>(), " of ", n, " did not converge");
  return {values, vectors.transpose(1, 2)};
}

}  // namespace drrl
