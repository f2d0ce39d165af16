#include "core/attention/rows.h"

#include <algorithm>

#ifdef DRRL_WITH_CUDA
#include "core/cuda/rows.h"
#endif

namespace drrl {

at::Tensor token_runs(const at::Tensor& x, int64_t groups, int64_t begin, int64_t count,
                      int64_t rows, int64_t stride) {
  // [B, H, L, e] -> [B, H, count, e, rows] -> [B, G, g, count, rows, e] -> [B, G, count, g, rows,
  // e]
  return x.narrow(2, begin, (count - 1) * stride + rows)
      .unfold(2, rows, stride)
      .transpose(-1, -2)
      .unflatten(1, {groups, x.size(1) / groups})
      .transpose(2, 3);
}

namespace {

// As one tensor of five dimensions, [B G, count, g, rows, e].
at::Tensor runs_of(const at::Tensor& x, int64_t groups, const PairRun& run, int64_t begin,
                   int64_t rows) {
  return token_runs(x, groups, begin, run.count, rows, run.stride).flatten(0, 1);
}

at::Tensor gathered(const at::Tensor& x, int64_t groups, const PairRun& run, int64_t begin,
                    int64_t rows) {
  return packed(runs_of(x, groups, run, begin, rows))
      .view({-1, x.size(1) / groups * rows, x.size(3)});
}

}  // namespace

at::Tensor key_rows(const at::Tensor& x, const PairRun& run) {
  return gathered(x, x.size(1), run, run.key_begin, run.key_rows);
}

at::Tensor query_rows(const at::Tensor& x, int64_t groups, const PairRun& run) {
  return gathered(x, groups, run, run.query_begin, run.query_rows);
}

void add_rows(const at::Tensor& x, int64_t groups, const PairRun& run, int64_t begin, int64_t rows,
              const at::Tensor& added, const at::Tensor& weights) {
  TORCH_CHECK(x.is_contiguous(), "add_rows: x ", x.sizes(), " with strides ", x.strides(),
              ", expected a contiguous tensor");
  auto places = runs_of(x, groups, run, begin, rows);
#ifdef DRRL_WITH_CUDA
  if (add_packed_cuda(added, weights, places)) {
    return;
  }
#endif
  places.add_((weights.defined() ? added * weights.unsqueeze(2).to(added.scalar_type()) : added)
                  .view(places.sizes()));
}

at::Tensor packed(const at::Tensor& x) {
#ifdef DRRL_WITH_CUDA
  if (!x.is_contiguous()) {
    if (auto result = pack_cuda(x)) {
      return *result;
    }
  }
#endif
  return x.contiguous();
}

void unpack(const at::Tensor& packed, const at::Tensor& x) {
#ifdef DRRL_WITH_CUDA
  if (unpack_cuda(packed, x)) {
    return;
  }
#endif
  x.copy_(packed.view(x.sizes()));
}

template <typename T>
at::Tensor on_device(const std::vector<T>& numbers, at::Device device) {
  const auto options = at::TensorOptions()
                           .dtype(c10::CppTypeToScalarType<T>::value)
                           .pinned_memory(device.is_cuda());
  const auto host = at::empty({static_cast<int64_t>(numbers.size())}, options);
  std::copy(numbers.begin(), numbers.end(), host.template data_ptr<T>());
  return host.to(device, /*non_blocking=*/true);
}
template at::Tensor on_device(const std::vector<int64_t>&, at::Device);
template at::Tensor on_device(const std::vector<double>&, at::Device);

at::Tensor into_basis(const at::Tensor& rows, const at::Tensor& basis) {
  return basis.defined() ? at::bmm(rows, basis) : rows;
}

at::Tensor out_of_basis(const at::Tensor& rows, const at::Tensor& basis) {
  return basis.defined() ? at::bmm(rows, basis.transpose(1, 2)) : rows;
}

at::Tensor wide_product(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != at::kBFloat16 && a.scalar_type() != at::kHalf) {
    return at::bmm(a, b);
  }
  return a.is_cuda() ? at::bmm(a, b, at::kFloat) : at::bmm(a.to(at::kFloat), b.to(at::kFloat));
}

}  // namespace drrl
