#include "core/cuda/gate_item.h"
#include "core/cuda/gate_kernel.h"
#include "core/cuda/numbers.h"

namespace drrl::cuda {
namespace {

constexpr int kWarps = 8;  // of a block, a row each

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) gate_kernel(GateRows rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows.n * rows.rows) {
    return;
  }
  const int64_t first = row * rows.keys;
  T *low = static_cast<T*>(rows.low) + first, *heavy = static_cast<T*>(rows.heavy) + first;
  const float sum = gate_row(ThreadWarp(), rows.keys, rows.chunk, rows.scores + first,
                             rows.full + first, rows.exact + first, rows.before[row],
                             rows.log_gate[row / rows.rows], [=](int j, float weight, bool exact) {
                               low[j] = narrow<T>(exact ? 0.0f : weight);
                               heavy[j] = narrow<T>(exact ? weight : 0.0f);
                             });
  if (threadIdx.x % 32 == 0) {
    rows.sums[row] = sum;
  }
}

template <typename T>
cudaError_t launch(const GateRows& rows, cudaStream_t stream) {
  const int64_t blocks = (rows.n * rows.rows + kWarps - 1) / kWarps;
  gate_kernel<T><<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(rows);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gate(const GateRows& rows, Element element, cudaStream_t stream) {
  switch (element) {
    case Element::kFloat: return launch<float>(rows, stream);
    case Element::kHalf: return launch<__half>(rows, stream);
    case Element::kBFloat16: return launch<__nv_bfloat16>(rows, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace drrl::cuda
