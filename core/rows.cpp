#include "core/rows.h"

namespace drrl {

at::Tensor token_runs(const at::Tensor& x, int64_t groups, int64_t begin, int64_t count, int64_t rows, int64_t stride) {
  // [B, H, L, e] -> [B, H, count, e, rows] -> [B, G, g, count, rows, e] -> [B, G, count, g, rows, e]
  return x.narrow(2, begin, (count - 1) * stride + rows)
      .unfold(2, rows, stride)
      .transpose(-1, -2)
      .unflatten(1, {groups, x.size(1) / groups})
      .transpose(2, 3);
}

at::Tensor key_rows(const at::Tensor& x, const PairRun& run) {
  return token_runs(x, x.size(1), run.key_begin, run.count, run.key_rows, run.stride)
      .reshape({-1, run.key_rows, x.size(3)})
      .contiguous();
}

at::Tensor query_rows(const at::Tensor& x, int64_t groups, const PairRun& run) {
  return token_runs(x, groups, run.query_begin, run.count, run.query_rows, run.stride)
      .reshape({-1, x.size(1) / groups * run.query_rows, x.size(3)})
      .contiguous();
}

at::Tensor into_basis(const at::Tensor& rows, const at::Tensor& basis) { return basis.defined() ? at::bmm(rows, basis) : rows; }

at::Tensor out_of_basis(const at::Tensor& rows, const at::Tensor& basis) {
  return basis.defined() ? at::bmm(rows, basis.transpose(1, 2)) : rows;
}

}  // namespace drrl
