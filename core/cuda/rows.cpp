#include "core/cuda/rows.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "core/cuda/check.h"
#include "core/cuda/element.h"

namespace drrl {
namespace {

constexpr int64_t kWordBytes = 16;

bool in_words(const at::Tensor& x, int64_t bytes) {
  return bytes % kWordBytes == 0 &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kWordBytes == 0;
}

// Nothing if x does not consist of such words.
std::optional<cuda::Pieces> pieces_of(const at::Tensor& x) {
  if (!x.is_cuda() || x.dim() != 5 || x.numel() == 0 || x.stride(4) != 1 ||
      (x.size(3) > 1 && x.stride(3) != x.size(4)) || !in_words(x, x.size(4) * x.element_size())) {
    return std::nullopt;
  }
  const auto words = [&](int64_t numbers) { return numbers * x.element_size() / kWordBytes; };
  for (int64_t i = 0; i < 3; ++i) {
    if (x.stride(i) * x.element_size() % kWordBytes != 0) {
      return std::nullopt;
    }
  }
  const cuda::Pieces pieces{x.size(0),
                            x.size(1),
                            x.size(2),
                            words(x.stride(0)),
                            words(x.stride(1)),
                            words(x.stride(2)),
                            words(x.size(3) * x.size(4))};
  return pieces.length <= INT32_MAX ? std::optional(pieces) : std::nullopt;
}

bool fits(const at::Tensor& packed, const at::Tensor& x) {
  return packed.is_contiguous() && packed.numel() == x.numel() &&
         packed.scalar_type() == x.scalar_type() && in_words(packed, kWordBytes);
}

void* data(const at::Tensor& x) {
  return const_cast<void*>(x.const_data_ptr());
}

}  // namespace

std::optional<at::Tensor> pack_cuda(const at::Tensor& x) {
  const auto pieces = pieces_of(x);
  if (!pieces) {
    return std::nullopt;
  }
  const c10::cuda::CUDAGuard on_device(x.device());
  auto packed = at::empty(x.sizes(), x.options());
  DRRL_CHECK_CUDA(
      cuda::launch_gather(*pieces, data(x), data(packed), c10::cuda::getCurrentCUDAStream()));
  return packed;
}

bool unpack_cuda(const at::Tensor& packed, const at::Tensor& x) {
  const auto pieces = pieces_of(x);
  if (!pieces || !fits(packed, x)) {
    return false;
  }
  const c10::cuda::CUDAGuard on_device(x.device());
  DRRL_CHECK_CUDA(
      cuda::launch_scatter(*pieces, data(packed), data(x), c10::cuda::getCurrentCUDAStream()));
  return true;
}

bool add_packed_cuda(const at::Tensor& packed, const at::Tensor& weights, const at::Tensor& x) {
  const auto pieces = pieces_of(x);
  const auto element = element_of(x.scalar_type());
  if (!pieces || !element || !fits(packed, x) ||
      (weights.defined() && (weights.scalar_type() != at::kFloat || !weights.is_contiguous()))) {
    return false;
  }
  const c10::cuda::CUDAGuard on_device(x.device());
  DRRL_CHECK_CUDA(cuda::launch_add(*pieces, *element, data(packed),
                                   weights.defined() ? weights.const_data_ptr<float>() : nullptr,
                                   x.size(4) * x.element_size() / kWordBytes, data(x),
                                   c10::cuda::getCurrentCUDAStream()));
  return true;
}

std::optional<at::Tensor> carrier_cuda(const at::Tensor& grad, const at::Tensor& delta) {
  const auto element = element_of(grad.scalar_type());
  if (!grad.is_cuda() || !element || !grad.is_contiguous() || delta.scalar_type() != at::kFloat ||
      grad.numel() == 0) {
    return std::nullopt;
  }
  const c10::cuda::CUDAGuard on_device(grad.device());
  const auto products = delta.contiguous();
  auto out = at::empty_like(grad);
  DRRL_CHECK_CUDA(cuda::launch_carrier(delta.numel(), grad.size(-1), *element,
                                       grad.const_data_ptr(), products.const_data_ptr<float>(),
                                       out.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace drrl
