#include "core/rows.h"

#ifdef DRRL_WITH_CUDA
#include "core/cuda/rows.h"
#endif

namespace drrl {

at::Tensor token_runs(const at::Tensor& x, int64_t groups, int64_t begin, int64_t count, int64_t rows, int64_t stride) {
  // [B, H, L, e] -> [B, H, count, e, rows] -> [B, G, g, count, rows, e] -> [B, G, count, g, rows, e]
  return x.narrow(2, begin, (count - 1) * stride + rows)
      .unfold(2, rows, stride)
      .transpose(-1, -2)
      .unflatten(1, {groups, x.size(1) / groups})
      .transpose(2, 3);
}

namespace {

at::Tensor gathered(const at::Tensor& x, int64_t groups, const PairRun& run, int64_t begin, int64_t rows) {
#ifdef DRRL_WITH_CUDA
  if (auto result = gather_runs_cuda(x, groups, begin, run.count, rows, run.stride)) {
    return *result;
  }
#endif
  return token_runs(x, groups, begin, run.count, rows, run.stride).reshape({-1, x.size(1) / groups * rows, x.size(3)}).contiguous();
}

}  // namespace

at::Tensor key_rows(const at::Tensor& x, const PairRun& run) { return gathered(x, x.size(1), run, run.key_begin, run.key_rows); }

at::Tensor query_rows(const at::Tensor& x, int64_t groups, const PairRun& run) { return gathered(x, groups, run, run.query_begin, run.query_rows); }

void add_rows(const at::Tensor& x, int64_t groups, const PairRun& run, int64_t begin, int64_t rows, const at::Tensor& added, const at::Tensor& weights) {
#ifdef DRRL_WITH_CUDA
  if (add_runs_cuda(x, groups, begin, run.count, rows, run.stride, added, weights)) {
    return;
  }
#endif
  auto places = token_runs(x, groups, begin, run.count, rows, run.stride);
  if (weights.defined()) {
    places.add_((added * weights.unsqueeze(2).to(added.scalar_type())).view(places.sizes()));
  } else {
    places.add_(added.view(places.sizes()));
  }
}

at::Tensor into_basis(const at::Tensor& rows, const at::Tensor& basis) { return basis.defined() ? at::bmm(rows, basis) : rows; }

at::Tensor out_of_basis(const at::Tensor& rows, const at::Tensor& basis) {
  return basis.defined() ? at::bmm(rows, basis.transpose(1, 2)) : rows;
}

}  // namespace drrl
