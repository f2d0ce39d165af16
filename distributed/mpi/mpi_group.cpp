#include "distributed/mpi/mpi_group.h"

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace drrl {

c10::intrusive_ptr<c10d::ProcessGroup> make_process_group(
    const c10::intrusive_ptr<MpiBackend>& backend) {
  auto result = c10::make_intrusive<c10d::ProcessGroup>(backend->getRank(), backend->getSize());
  result->setBackend(at::kCPU, c10d::ProcessGroup::BackendType::MPI,
                     c10::intrusive_ptr<c10d::Backend>(backend));
  result->setDefaultBackend(c10d::ProcessGroup::BackendType::MPI);
  result->setGroupName(backend->getBackendOptions()->group_name);
  return result;
}

Group make_mpi_group(const std::string& name, MPI_Comm parent, std::chrono::milliseconds timeout,
                     int64_t color) {
  require_mpi();
  int rank = 0;
  check_mpi(MPI_Comm_rank(parent, &rank), "MPI_Comm_rank");
  auto communicator = MpiCommunicator::split(parent, color, rank);
  auto world_ranks = communicator.world_ranks();
  if (world_ranks.size() == 1) {
    return Group(name, nullptr, timeout, std::move(world_ranks));
  }
  const auto backend = c10::make_intrusive<MpiBackend>(
      std::move(communicator), c10::make_intrusive<MpiOptions>(name, timeout));
  return Group(name, make_process_group(backend), timeout, std::move(world_ranks));
}

}  // namespace drrl
