#include "models/training/gradient_reducer.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include <ATen/core/grad_mode.h>

#include "core/error.h"

namespace drrl {

GradientReducer::GradientReducer(std::vector<Parameter>& parameters, const Group& data_parallel,
                                 const Group& kv, int64_t bucket_bytes)
    : parameters_(parameters), data_parallel_(data_parallel), kv_(kv) {
  if (data_parallel_.size() == 1) {
    return;
  }
  const auto count = static_cast<int64_t>(parameters_.size());
  views_.resize(parameters_.size());
  int64_t end = count;
  while (end > 0) {
    Bucket bucket;
    bucket.first = end;
    int64_t elements = 0;
    const auto fits = [&](int64_t more) {
      return (elements + more) * static_cast<int64_t>(sizeof(float)) <= bucket_bytes;
    };
    do {
      elements += parameters_[static_cast<size_t>(--bucket.first)].value.numel();
    } while (bucket.first > 0 &&
             fits(parameters_[static_cast<size_t>(bucket.first - 1)].value.numel()));
    bucket.flat = at::zeros({elements}, parameters_.front().value.options().requires_grad(false));
    int64_t offset = 0;
    for (int64_t i = bucket.first; i < end; ++i) {
      const at::Tensor& value = parameters_[static_cast<size_t>(i)].value;
      views_[static_cast<size_t>(i)] = bucket.flat.narrow(0, offset, value.numel())
                                           .view(value.sizes());
      offset += value.numel();
    }
    end = bucket.first;
    buckets_.push_back(std::move(bucket));
  }
}

void GradientReducer::begin() {
  const at::NoGradGuard no_grad;
  next_ = 0;
  for (Bucket& bucket : buckets_) {
    bucket.flat.zero_();
  }
  for (size_t i = 0; i < parameters_.size(); ++i) {
    parameters_[i].value.mutable_grad() = views_.empty() ? at::Tensor() : views_[i];
  }
}

void GradientReducer::complete_from(int64_t first) {
  const at::NoGradGuard no_grad;
  const auto count = static_cast<int64_t>(buckets_.size());
  for (; next_ < count && buckets_[static_cast<size_t>(next_)].first >= first; ++next_) {
    Bucket& bucket = buckets_[static_cast<size_t>(next_)];
    bucket.norm = at::linalg_vector_norm(bucket.flat);
    bucket.pending = data_parallel_.all_reduce_async(bucket.flat);
  }
}

bool GradientReducer::finish() {
  const at::NoGradGuard no_grad;
  complete_from(0);
  for (Parameter& parameter : parameters_) {
    if (!parameter.value.grad().defined()) {
      parameter.value.mutable_grad() = at::zeros_like(parameter.value.detach(),
                                                      at::MemoryFormat::Contiguous);
    }
  }
  std::vector<at::Tensor> norms;
  for (Bucket& bucket : buckets_) {
    bucket.pending.wait();
    norms.push_back(bucket.norm);
  }
  if (norms.empty() && kv_.size() > 1) {
    std::vector<at::Tensor> gradients;
    std::transform(parameters_.begin(), parameters_.end(), std::back_inserter(gradients),
                   [](const Parameter& p) { return p.value.grad(); });
    norms = at::_foreach_norm(gradients, 2.0);
  }
  sum_shared_rows(parameters_, kv_);
  return norms.empty() || std::isfinite(at::stack(norms).sum().item<double>());
}

void sum_shared_rows(const std::vector<Parameter>& parameters, const Group& kv) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> shared, flat;
  for (const Parameter& parameter : parameters) {
    if (parameter.shared_rows > 0) {
      const at::Tensor& grad = parameter.value.grad();
      shared.push_back(grad.narrow(0, grad.size(0) - parameter.shared_rows, parameter.shared_rows));
      flat.push_back(shared.back().flatten());
    }
  }
  if (shared.empty()) {
    return;
  }
  check(ErrorKind::kUsage, kv.size() > 1,
        "other tensor-parallel ranks hold this one's KV head, too, but the group of those ranks "
        "was not handed in");
  at::Tensor sum = at::cat(flat);
  kv.all_reduce(sum);
  int64_t offset = 0;
  for (const at::Tensor& rows : shared) {
    rows.copy_(sum.narrow(0, offset, rows.numel()).view(rows.sizes()));
    offset += rows.numel();
  }
}

at::Tensor squared_gradient_norm(const std::vector<Parameter>& parameters,
                                 const Group& tensor_parallel, const Group& kv) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> gradients;
  for (const Parameter& parameter : parameters) {
    if (parameter.sharded || tensor_parallel.rank() == 0) {
      const at::Tensor& grad = parameter.value.grad();
      gradients.push_back(kv.rank() == 0 ? grad
                                         : grad.narrow(0, 0, grad.size(0) - parameter.shared_rows));
    }
  }
  if (gradients.empty()) {
    return at::zeros({},
                     parameters.front().value.options().dtype(at::kDouble).requires_grad(false));
  }
  return at::stack(at::_foreach_norm(gradients, 2.0)).to(at::kDouble).square().sum();
}

double clip_factor(double norm, double clip) {
  return clip > 0 ? std::min(1.0, clip / (norm + 1e-6)) : 1.0;
}

}  // namespace drrl
