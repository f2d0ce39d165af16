#include "core/cuda/basis.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/core/Event.h>

#include <deque>
#include <mutex>

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
    Report report{at::empty({}, at::TensorOptions().dtype(at::kBool).pinned_memory(true)), c10::Event(c10::DeviceType::CUDA)};
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
      check(ErrorKind::kNumerics, !failed, "update_basis: a Gram matrix of an earlier call is not finite or not positive semidefinite");
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

int narrow(int64_t size) { return static_cast<int>(size); }

}  // namespace

bool update_basis_cuda(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y, int64_t steps, const UpdateSettings& settings,
                       Basis& result) {
  const int64_t n = right.size(0), d = right.size(1), rank = right.size(2);
  if (d % 4 != 0 || rank % 8 != 0 || right.scalar_type() != at::kFloat) {
    return false;
  }
  const c10::cuda::CUDAGuard on_device(gram_x.device());
  reports().check_those_done();
  const auto start = right.contiguous(), x = gram_x.contiguous(), y = gram_y.contiguous();
  result = {at::empty(start.sizes(), start.options()), at::empty(start.sizes(), start.options()), {}};
  if (n == 0) {
    return true;
  }
  const auto failed = at::empty({n}, start.options().dtype(at::kInt));
  const auto room = scratch(n, cuda::update_scratch_size(narrow(d), narrow(rank)), x);
  DRRL_CHECK_CUDA(cuda::launch_update(n, narrow(d), narrow(rank), narrow(steps), start.const_data_ptr<float>(), x.const_data_ptr<double>(),
                                      y.const_data_ptr<double>(), settings,
                                      result.left.data_ptr<float>(), result.right.data_ptr<float>(), failed.data_ptr<int>(), room.data_ptr<double>(),
                                      c10::cuda::getCurrentCUDAStream()));
  reports().add(failed);
  return true;
}

bool residual_factor_cuda(const Basis& basis, const at::Tensor& gram, const at::Tensor& keys, const at::Tensor& start, at::Tensor& factor) {
  const int64_t n = gram.size(0), d = gram.size(1), rank = basis.left.size(2), columns = start.size(1);
  if (d % 4 != 0 || rank % 2 != 0 || columns % 8 != 0 || basis.left.scalar_type() != at::kFloat || gram.scalar_type() != at::kDouble || n == 0) {
    return false;
  }
  const c10::cuda::CUDAGuard on_device(gram.device());
  const auto left = basis.left.contiguous(), right = basis.right.contiguous(), g = gram.contiguous(), counts = keys.to(at::kDouble).contiguous();
  const auto room = scratch(n, cuda::residual_scratch_size(narrow(d), narrow(rank), narrow(columns)), g);
  factor = at::empty({n, d, columns}, left.options());
  DRRL_CHECK_CUDA(cuda::launch_residual(n, narrow(d), narrow(rank), narrow(columns), left.const_data_ptr<float>(), right.const_data_ptr<float>(),
                                        g.const_data_ptr<double>(), counts.const_data_ptr<double>(), start.contiguous().const_data_ptr<double>(),
                                        factor.data_ptr<float>(), room.data_ptr<double>(), c10::cuda::getCurrentCUDAStream()));
  return true;
}

}  // namespace drrl
