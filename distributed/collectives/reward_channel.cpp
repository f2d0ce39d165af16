#include "distributed/collectives/reward_channel.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#ifdef DRRL_WITH_MPI
#include "distributed/mpi/mpi_backend.h"
#endif

namespace drrl {
namespace {

// Whether records of unequal sizes can be gathered as they are.
bool gathers_unequal([[maybe_unused]] const Group& group) {
#ifdef DRRL_WITH_MPI
  return group.process_group() && group.message_device().is_cpu() &&
         dynamic_cast<MpiBackend*>(group.process_group()->getBackend(at::kCPU).get()) != nullptr;
#else
  return false;
#endif
}

}  // namespace

RewardChannel::RewardChannel(Group group, int64_t record, int64_t weights, Train train)
    : group_(std::move(group)), record_(record), train_(std::move(train)) {
  TORCH_CHECK(record >= 1 && weights >= 1, "RewardChannel: records of ", record, " and weights of ",
              weights, " elements, expected at least 1");
  const auto options = at::TensorOptions(group_.message_device()).dtype(at::kLong);
  at::Tensor sizes = at::empty({group_.size()}, options);
  group_.all_gather(sizes, at::full({1}, record, options));
  sizes = sizes.cpu();
  sizes_.assign(sizes.const_data_ptr<int64_t>(), sizes.const_data_ptr<int64_t>() + group_.size());
  if (!gathers_unequal(group_)) {
    std::fill(sizes_.begin(), sizes_.end(), *std::max_element(sizes_.begin(), sizes_.end()));
  }
  weights_ = at::empty({weights}, options.dtype(at::kDouble));
}

void RewardChannel::post(const at::Tensor& record) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(!under_way_, "RewardChannel: a round is under way");
  TORCH_CHECK(record.dim() == 1 && record.numel() == record_ && record.scalar_type() == at::kDouble,
              "RewardChannel: a record of ", record.sizes(), " x ", record.scalar_type(),
              ", expected ", record_, " x Double");
  sent_ = at::zeros({sizes_[static_cast<size_t>(group_.rank())]}, weights_.options());
  sent_.narrow(0, 0, record_).copy_(record);
  under_way_ = true;
  std::vector<at::Tensor> records;
  if (group_.rank() == 0) {
    for (const int64_t size : sizes_) {
      records.push_back(at::empty({size}, sent_.options()));
    }
  }
  gather_ = group_.gather_async(records, sent_);
  if (group_.rank() == 0) {
    round_ = std::async(std::launch::async, [this, records = std::move(records)]() mutable {
      return trained(std::move(records));
    });
  }
}

at::Tensor RewardChannel::trained(std::vector<at::Tensor> records) {
  const at::NoGradGuard no_grad;
  gather_.wait();
  for (at::Tensor& one : records) {
    one = one.cpu();
  }
  const at::Tensor weights = train_(records);
  TORCH_CHECK(weights.numel() == weights_.numel(), "RewardChannel: the trainer made ",
              weights.numel(), " weights, expected ", weights_.numel());
  return weights.flatten().to(at::kDouble);
}

at::Tensor RewardChannel::take() {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(under_way_, "RewardChannel: no round is under way");
  const auto start = std::chrono::steady_clock::now();
  under_way_ = false;
  if (group_.rank() == 0) {
    weights_.copy_(round_.get());
  } else {
    gather_.wait();
  }
  group_.broadcast(weights_);
  const at::Tensor weights = weights_.cpu().clone();
  waited_ms_ += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
                    .count();
  return weights;
}

}  // namespace drrl
