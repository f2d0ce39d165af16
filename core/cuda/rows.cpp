#include "core/cuda/rows.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "core/cuda/check.h"
#include "core/cuda/rows_kernel.h"

namespace drrl {
namespace {

constexpr int64_t kWordBytes = 16;

bool in_words(const at::Tensor& x, int64_t bytes) { return bytes % kWordBytes == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kWordBytes == 0; }

std::optional<cuda::Element> element_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return cuda::Element::kFloat;
    case at::kHalf: return cuda::Element::kHalf;
    case at::kBFloat16: return cuda::Element::kBFloat16;
    default: return std::nullopt;
  }
}

// Empty if x [B, H, L, e] does not consist of such words.
std::optional<cuda::Pieces> pieces_of(const at::Tensor& x, int64_t groups, int64_t count, int64_t rows, int64_t stride) {
  const int64_t row_bytes = x.size(3) * x.element_size(), row = row_bytes / kWordBytes;
  if (!x.is_cuda() || !x.is_contiguous() || !in_words(x, row_bytes) || x.numel() == 0 || count * rows == 0 || rows * row > INT32_MAX) {
    return std::nullopt;
  }
  const int64_t heads = x.size(1) / groups, length = x.size(2);
  return cuda::Pieces{x.size(0) * groups, count, heads, heads * length * row, stride * row, length * row, rows * row};
}

char* at_token(const at::Tensor& x, int64_t token) {
  return static_cast<char*>(const_cast<void*>(x.const_data_ptr())) + token * x.size(3) * x.element_size();
}

}  // namespace

std::optional<at::Tensor> gather_runs_cuda(const at::Tensor& x, int64_t groups, int64_t begin, int64_t count, int64_t rows, int64_t stride) {
  const auto pieces = pieces_of(x, groups, count, rows, stride);
  if (!pieces) {
    return std::nullopt;
  }
  const c10::cuda::CUDAGuard on_device(x.device());
  auto result = at::empty({x.size(0) * groups * count, x.size(1) / groups * rows, x.size(3)}, x.options());
  DRRL_CHECK_CUDA(cuda::launch_gather(*pieces, at_token(x, begin), result.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return result;
}

bool add_runs_cuda(const at::Tensor& x, int64_t groups, int64_t begin, int64_t count, int64_t rows, int64_t stride, const at::Tensor& added,
                   const at::Tensor& weights) {
  const auto pieces = pieces_of(x, groups, count, rows, stride);
  const auto element = element_of(x);
  if (!pieces || !element || added.scalar_type() != x.scalar_type() || !added.is_contiguous() || !in_words(added, kWordBytes) ||
      (weights.defined() && (weights.scalar_type() != at::kFloat || !weights.is_contiguous()))) {
    return false;
  }
  const c10::cuda::CUDAGuard on_device(x.device());
  DRRL_CHECK_CUDA(cuda::launch_add(*pieces, *element, added.const_data_ptr(), weights.defined() ? weights.const_data_ptr<float>() : nullptr,
                                   x.size(3) * x.element_size() / kWordBytes, at_token(x, begin), c10::cuda::getCurrentCUDAStream()));
  return true;
}

std::optional<at::Tensor> carrier_cuda(const at::Tensor& grad, const at::Tensor& delta) {
  const auto element = element_of(grad);
  if (!grad.is_cuda() || !element || !grad.is_contiguous() || delta.scalar_type() != at::kFloat || grad.numel() == 0) {
    return std::nullopt;
  }
  const c10::cuda::CUDAGuard on_device(grad.device());
  const auto products = delta.contiguous();
  auto out = at::empty_like(grad);
  DRRL_CHECK_CUDA(cuda::launch_carrier(delta.numel(), grad.size(-1), *element, grad.const_data_ptr(), products.const_data_ptr<float>(), out.data_ptr(),
                                       c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace drrl
