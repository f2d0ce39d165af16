#include "core/cuda/basis.h"

#include <algorithm>
#include <deque>
#include <mutex>

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "core/attention/rows.h"
#include "core/cuda/basis_kernel.h"
#include "core/cuda/check.h"

namespace drrl {
namespace {

at::Tensor scratch(int64_t items, int64_t doubles, const at::Tensor& like) {
  return at::empty({items, doubles}, like.options().dtype(at::kDouble));
}

// What kernels said that may not have run yet.
class Reports {
 public:
  void add(const at::Tensor& failed) {
    Report report{at::empty({}, at::TensorOptions().dtype(at::kBool).pinned_memory(true)),
                  c10::Event(c10::DeviceType::CUDA)};
    report.failed.copy_(failed.any(), /*non_blocking=*/true);
    report.done.record(c10::cuda::getCurrentCUDAStream().unwrap());
    const std::lock_guard lock(mutex_);
    pending_.push_back(std::move(report));
  }
  void check_those_done() {
    const std::lock_guard lock(mutex_);
    while (!pending_.empty() && pending_.front().done.query()) {
      const bool failed = *pending_.front().failed.const_data_ptr<bool>();
      pending_.pop_front();
      check(ErrorKind::kNumerics, !failed,
            "update_basis: a Gram matrix of an earlier call is not finite or not positive "
            "semidefinite");
    }
  }

 private:
  struct Report {
    at::Tensor failed;
    c10::Event done;
  };
  std::mutex mutex_;
  std::deque<Report> pending_;
};

Reports& reports() {
  static Reports* all = new Reports;  // never destroyed: at exit CUDA may be gone before it
  return *all;
}

int narrow(int64_t size) {
  return static_cast<int>(size);
}

// The items whose rank is at most `columns`, those of large ranks first, as they take the longest.
class ItemsOnGpu {
 public:
  ItemsOnGpu(const std::vector<int64_t>& ranks, int64_t columns, at::Device device)
      : n_(static_cast<int64_t>(ranks.size())) {
    std::vector<int64_t> numbers;
    for (int64_t i = 0; i < n_; ++i) {
      if (ranks[i] <= columns) {
        numbers.push_back(i);
      }
    }
    std::stable_sort(numbers.begin(), numbers.end(),
                     [&](int64_t a, int64_t b) { return ranks[a] > ranks[b]; });
    count = static_cast<int64_t>(numbers.size());
    for (int64_t i = 0; i < count; ++i) {
      numbers.push_back(ranks[numbers[i]]);
    }
    largest = count > 0 ? numbers[count] : 0;
    numbers_ = on_device(numbers, device);
  }
  cuda::Items for_launch() const {
    const auto* data = numbers_.const_data_ptr<int64_t>();
    return {n_, count, data, data + count, narrow(largest)};
  }

  int64_t count, largest;

 private:
  int64_t n_;
  at::Tensor numbers_;
};

bool multiples_of(int64_t factor, const std::vector<int64_t>& ranks, int64_t columns) {
  return std::all_of(ranks.begin(), ranks.end(),
                     [&](int64_t rank) { return rank > columns || rank % factor == 0; });
}

template <typename T>
cuda::Shared<T> shared(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), x.size(0)};
}

}  // namespace

bool update_bases_cuda(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y,
                       const std::vector<int64_t>& ranks, int64_t columns, int64_t steps,
                       const UpdateSettings& settings, Basis& result) {
  const int64_t n = gram_x.size(0), d = gram_x.size(1);
  if (d % 4 != 0 || !multiples_of(8, ranks, columns) || right.scalar_type() != at::kFloat) {
    return false;
  }
  const c10::cuda::CUDAGuard guard(gram_x.device());
  reports().check_those_done();
  const auto start = right.contiguous(), x = gram_x.contiguous(), y = gram_y.contiguous();
  result = {
      at::empty({n, d, columns}, start.options()), at::empty({n, d, columns}, start.options()), {}};
  const ItemsOnGpu items(ranks, columns, gram_x.device());
  if (items.count == 0) {
    return true;
  }
  const auto failed = at::empty({items.count}, start.options().dtype(at::kInt));
  const auto room = scratch(items.count,
                            cuda::update_scratch_size(narrow(d), narrow(items.largest)), x);
  DRRL_CHECK_CUDA(cuda::launch_update(
      items.for_launch(), narrow(d), narrow(steps), shared<float>(start), narrow(start.size(2)),
      shared<double>(x), shared<double>(y), settings, result.left.data_ptr<float>(),
      result.right.data_ptr<float>(), narrow(columns), failed.data_ptr<int>(),
      room.data_ptr<double>(), c10::cuda::getCurrentCUDAStream()));
  reports().add(failed);
  return true;
}

bool residual_factor_cuda(const Basis& basis, const at::Tensor& gram, const at::Tensor& keys,
                          const std::vector<int64_t>& ranks, const at::Tensor& start,
                          at::Tensor& factor) {
  const int64_t n = gram.size(0), d = gram.size(1), basis_columns = basis.left.size(2),
                columns = start.size(1);
  if (d % 4 != 0 || !multiples_of(2, ranks, basis_columns) || columns % 8 != 0 ||
      basis.left.scalar_type() != at::kFloat || gram.scalar_type() != at::kDouble) {
    return false;
  }
  const c10::cuda::CUDAGuard guard(gram.device());
  const auto left = basis.left.contiguous(), right = basis.right.contiguous(),
             g = gram.contiguous(), counts = keys.to(at::kDouble).contiguous();
  factor = at::empty({n, d, columns}, left.options());
  const ItemsOnGpu items(ranks, basis_columns, gram.device());
  if (items.count == 0) {
    return true;
  }
  const auto room = scratch(
      items.count, cuda::residual_scratch_size(narrow(d), narrow(items.largest), narrow(columns)),
      g);
  DRRL_CHECK_CUDA(cuda::launch_residual(
      items.for_launch(), narrow(d), narrow(columns), left.const_data_ptr<float>(),
      right.const_data_ptr<float>(), narrow(basis_columns), g.const_data_ptr<double>(),
      counts.const_data_ptr<double>(), start.contiguous().const_data_ptr<double>(),
      factor.data_ptr<float>(), room.data_ptr<double>(), c10::cuda::getCurrentCUDAStream()));
  return true;
}

}  // namespace drrl
