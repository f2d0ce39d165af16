#include "core/types/lowrank_plan.h"

namespace drrl {

void ExactEntries::sort() const {
  if (!places_.defined()) {
    return;
  }
  at::NoGradGuard no_grad;
  const auto sorted = std::get<0>(places_.sort());
  begin_ = at::searchsorted(sorted, at::arange(rows_ + 1, sorted.options()) * length_).to(at::kCPU);
  keys_ = sorted.remainder(length_).to(at::kInt).to(at::kCPU);
  places_.reset();
}

const at::Tensor& ExactEntries::begin() const {
  sort();
  return begin_;
}

const at::Tensor& ExactEntries::keys() const {
  sort();
  return keys_;
}

int64_t ExactEntries::count(int64_t row, int64_t rows, int64_t key, int64_t key_count) const {
  const int64_t* at = begin().const_data_ptr<int64_t>();
  const auto* all = keys().const_data_ptr<int32_t>();
  int64_t sum = 0;
  for (int64_t i = row; i < row + rows; ++i) {
    const auto first = std::lower_bound(all + at[i], all + at[i + 1], static_cast<int32_t>(key));
    sum += std::lower_bound(first, all + at[i + 1], static_cast<int32_t>(key + key_count)) - first;
  }
  return sum;
}

}  // namespace drrl
