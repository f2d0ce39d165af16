// The one file that may name c10d::ProcessGroupNCCL: newer releases of PyTorch rename it.
#include "distributed/nccl/nccl_group.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

#ifdef DRRL_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

namespace drrl {

#ifdef DRRL_WITH_CUDA

bool built_with_nccl() noexcept {
  return true;
}

void require_nccl(at::Device device) {
  check(ErrorKind::kUsage, device.is_cuda() && device.has_index(),
        "NCCL groups need a CUDA device with an index, not ", device);
  const int64_t count = at::cuda::device_count();
  check(ErrorKind::kUsage, count > 0, "device ", device,
        ": this machine has no usable GPU or driver");
  check(ErrorKind::kUsage, device.index() < count, "device ", device, ": this machine has ", count,
        " GPU(s). Start at most one process per GPU");
}

Group make_nccl_group(const std::string& name, const c10::intrusive_ptr<c10d::Store>& store,
                      std::vector<int64_t> world_ranks, int64_t world_rank, at::Device device,
                      std::chrono::milliseconds timeout, const Group& cpu) {
  require_nccl(device);
  const auto place = std::find(world_ranks.begin(), world_ranks.end(), world_rank);
  check(ErrorKind::kInternal, place != world_ranks.end(), "world rank ", world_rank,
        " is not in group '", name, "'");
  const int rank = static_cast<int>(place - world_ranks.begin());
  const int size = static_cast<int>(world_ranks.size());
  if (size == 1) {
    return Group(name, nullptr, timeout, std::move(world_ranks));
  }
  check(ErrorKind::kInternal, cpu.size() == 1 || (cpu.rank() == rank && cpu.size() == size),
        "group '", name, "': rank ", rank, " of ", size, " over NCCL, but rank ", cpu.rank(),
        " of ", cpu.size(), " on the CPU");
  try {
    const auto keys = c10::make_intrusive<c10d::PrefixStore>(
        c10::str(name, ".", world_ranks.front()), store);
    const auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = timeout;
    options->group_name = name;
    options->global_ranks_in_group.assign(world_ranks.begin(), world_ranks.end());
    const auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(keys, rank, size, options);

    const auto group = c10::make_intrusive<c10d::ProcessGroup>(keys, rank, size);
    group->setBoundDeviceId(device);
    group->setBackend(at::kCUDA, c10d::ProcessGroup::BackendType::NCCL,
                      c10::intrusive_ptr<c10d::Backend>(backend));
    if (cpu.size() > 1) {
      // setBackend binds every backend to the group's device; the CPU backend ignores that.
      group->setBackend(at::kCPU, cpu.process_group()->getBackendType(),
                        cpu.process_group()->getBackend(at::kCPU));
    }
    group->setDefaultBackend(c10d::ProcessGroup::BackendType::NCCL);
    group->setGroupName(name);
    return Group(name, group, timeout, std::move(world_ranks));
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    raise(ErrorKind::kCommunication, "world rank ", world_rank, " cannot make NCCL group '", name,
          "' (rank ", rank, " of ", size, ") on ", device, ": ", error.what());
  }
}

#else

bool built_with_nccl() noexcept {
  return false;
}

void require_nccl(at::Device device) {
  raise(ErrorKind::kUsage, "device ", device,
        " needs NCCL, but drrl was built without CUDA (its CMake option DRRL_CUDA)");
}

Group make_nccl_group(const std::string& /*name*/, const c10::intrusive_ptr<c10d::Store>& /*store*/,
                      std::vector<int64_t> /*world_ranks*/, int64_t /*world_rank*/,
                      at::Device device, std::chrono::milliseconds /*timeout*/,
                      const Group& /*cpu*/) {
  require_nccl(device);
  return {};  // not reached
}

#endif

}  // namespace drrl
