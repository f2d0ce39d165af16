#include "core/linalg/eigensolver.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "core/error.h"

namespace drrl {

std::tuple<at::Tensor, at::Tensor> batched_eigh(const at::Tensor& matrices) {
  TORCH_CHECK(matrices.dim() == 3 && matrices.size(1) == matrices.size(2),
              "batched_eigh: ", matrices.sizes(), ", expected [N, d, d]");
  if (matrices.is_cuda()) {
#ifdef DRRL_WITH_CUDA
    return batched_eigh_cuda(matrices);
#endif
  }
  at::NoGradGuard no_grad;
  const int64_t n = matrices.size(0);
  auto values = at::empty({n, matrices.size(1)}, matrices.options());
  auto vectors = at::empty_like(matrices, at::MemoryFormat::Contiguous);
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_grad_in_thread;
    auto [w, v] = at::linalg_eigh(matrices.slice(0, begin, end), "L");
    values.slice(0, begin, end).copy_(w);
    vectors.slice(0, begin, end).copy_(v);
  });
  return {values, vectors};
}

}  // namespace drrl
