#include "core/cuda/gate.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "core/cuda/check.h"
#include "core/cuda/element.h"
#include "core/cuda/gate_kernel.h"

namespace drrl {

bool gate_cuda(const at::Tensor& scores, const at::Tensor& full, const at::Tensor& before,
               const at::Tensor& log_gate, int64_t chunk, at::ScalarType dtype, at::Tensor& sums,
               at::Tensor& low, at::Tensor& heavy, at::Tensor& exact) {
  const auto element = element_of(dtype);
  if (!scores.is_cuda() || scores.scalar_type() != at::kFloat || !element) {
    return false;
  }
  const c10::cuda::CUDAGuard on_device(scores.device());
  const auto met = before.contiguous(), gates = log_gate.contiguous();
  TORCH_INTERNAL_ASSERT(scores.is_contiguous() && full.is_contiguous() &&
                        met.scalar_type() == at::kFloat && gates.scalar_type() == at::kFloat);
  sums = at::empty_like(met);
  low = at::empty(scores.sizes(), scores.options().dtype(dtype));
  heavy = at::empty_like(low);
  exact = at::empty(scores.sizes(), scores.options().dtype(at::kBool));
  if (scores.numel() == 0) {
    return true;
  }
  const cuda::GateRows rows{scores.size(0),
                            scores.size(1),
                            static_cast<int>(scores.size(2)),
                            static_cast<int>(chunk),
                            scores.data_ptr<float>(),
                            full.const_data_ptr<float>(),
                            met.const_data_ptr<float>(),
                            gates.const_data_ptr<float>(),
                            sums.data_ptr<float>(),
                            exact.data_ptr<bool>(),
                            low.data_ptr(),
                            heavy.data_ptr()};
  DRRL_CHECK_CUDA(cuda::launch_gate(rows, *element, c10::cuda::getCurrentCUDAStream()));
  return true;
}

}  // namespace drrl
