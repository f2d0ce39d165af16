#include "distributed/mesh.h"

#include <utility>
#include <vector>

#include "core/error.h"
#include "distributed/agreement.h"
#include "distributed/nccl_group.h"
#include "distributed/rendezvous.h"
#ifdef DRRL_WITH_MPI
#include "distributed/mpi_group.h"
#endif

namespace drrl {
namespace {

struct Groups {
  Group world;
  Group tp;
  Group dp;
  Group cp = {};  // this and data only with cp > 1
  Group data = {};
};

std::string describe(MeshShape shape) {
  return c10::str("tp=", shape.tp, ", dp=", shape.dp) + (shape.cp == 1 ? std::string() : c10::str(", cp=", shape.cp));
}

// Before anything that depends on it: ranks that were given different shapes would wait for each other in different groups.
void check_same_shape(const Group& world, MeshShape shape) {
  check_agreement(world, hash_bytes(describe(shape)), c10::str("the mesh (", describe(shape), " here)"));
}

#ifdef DRRL_WITH_MPI
Group make_mpi_world(const std::string& name, const Environment& environment, std::chrono::milliseconds timeout) {
  require_mpi();
  int size = 0;
  int rank = 0;
  check_mpi(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
  check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank");
  check(ErrorKind::kUsage, size == environment.world_size && rank == environment.world_rank, "MPI says rank ", rank, " of ",
        size, ", but ", drrl::name(environment.launcher), " says rank ", environment.world_rank, " of ", environment.world_size,
        " (a program linked to another MPI than its launcher's, or srun without --mpi=pmix?)");
  return make_mpi_group(name, MPI_COMM_WORLD, timeout);
}

Groups make_mpi_groups(const Environment& environment, MeshShape shape, std::chrono::milliseconds timeout) {
  Groups groups;
  groups.world = make_mpi_world("world", environment, timeout);
  check_same_shape(groups.world, shape);
  check_shape(shape, environment.world_size);
  const int64_t rank = environment.world_rank, sequence = shape.tp * shape.cp;  // processes that share a sequence
  groups.tp = make_mpi_group("tp", MPI_COMM_WORLD, timeout, /*color=*/rank / shape.tp);
  groups.dp = make_mpi_group("dp", MPI_COMM_WORLD, timeout, /*color=*/rank % sequence);
  if (shape.cp > 1) {
    groups.cp = make_mpi_group("cp", MPI_COMM_WORLD, timeout, /*color=*/rank / sequence * shape.tp + rank % shape.tp);
    groups.data = make_mpi_group("data", MPI_COMM_WORLD, timeout, /*color=*/rank % shape.tp);
  }
  return groups;
}
#else
Group make_mpi_world(const std::string& /*name*/, const Environment& environment, std::chrono::milliseconds /*timeout*/) {
  raise(ErrorKind::kUsage, "started by ", name(environment.launcher), " as one of ", environment.world_size,
        " processes, but this drrl was built without MPI (DRRL_MPI=OFF): start it with torchrun, or build it with MPI");
}

Groups make_mpi_groups(const Environment& environment, MeshShape /*shape*/, std::chrono::milliseconds timeout) {
  return {make_mpi_world("world", environment, timeout), {}, {}};
}
#endif

// `count` world ranks from `first` on, `stride` apart.
std::vector<int64_t> strided(int64_t first, int64_t count, int64_t stride) {
  std::vector<int64_t> result;
  for (int64_t i = 0; i < count; ++i) {
    result.push_back(first + i * stride);
  }
  return result;
}

Groups make_nccl_groups(const Environment& environment, MeshShape shape, at::Device device, std::chrono::milliseconds timeout,
                        const Groups& cpu) {
  const int64_t rank = environment.world_rank;
  const int64_t sequence = shape.tp * shape.cp;
  const auto store = make_store(environment, cpu.world, timeout);
  const auto group = [&](const char* name, int64_t first, int64_t count, int64_t stride, const Group& beside) {
    return make_nccl_group(name, store, strided(first, count, stride), rank, device, timeout, beside);
  };
  Groups groups{group("world", 0, environment.world_size, 1, cpu.world), group("tp", rank - rank % shape.tp, shape.tp, 1, cpu.tp),
                group("dp", rank % sequence, shape.dp, sequence, cpu.dp)};
  if (shape.cp > 1) {
    groups.cp = group("cp", rank - rank % sequence + rank % shape.tp, shape.cp, shape.tp, cpu.cp);
    groups.data = group("data", rank % shape.tp, shape.dp * shape.cp, shape.tp, cpu.data);
  }
  return groups;
}

// Whether the launcher has brought up MPI. Errors: Error(kUsage) for CPU tensors where it has not.
bool has_mpi(const Environment& environment, at::Device device) {
  const bool mpi = environment.launcher != Launcher::kTorchrun;
  check(ErrorKind::kUsage, mpi || device.is_cuda(),
        "CPU tensors have no groups under torchrun (LibTorch's C++ headers come without Gloo): start the program with mpirun, "
        "or hand in groups of your own");
  return mpi;
}

void check_place(const Group& group, const char* role, int64_t rank, int64_t size) {
  check(ErrorKind::kUsage, group.rank() == rank && group.size() == size, "the ", role, " group '", group.name(),
        "' has this process as rank ", group.rank(), " of ", group.size(), ", expected rank ", rank, " of ", size,
        " (tp varies fastest, then cp)");
}

}  // namespace

void check_shape(MeshShape shape, int64_t world_size) {
  check(ErrorKind::kUsage, shape.tp >= 1 && shape.dp >= 1 && shape.cp >= 1, "tp=", shape.tp, ", dp=", shape.dp, " and cp=", shape.cp,
        " must be at least 1");
  // Divided, not multiplied: the product may overflow.
  check(ErrorKind::kUsage, world_size % shape.tp == 0 && world_size / shape.tp % shape.cp == 0 && world_size / shape.tp / shape.cp == shape.dp, "tp=",
        shape.tp, " times dp=", shape.dp, shape.cp == 1 ? std::string() : c10::str(" times cp=", shape.cp), " is not the world size of ", world_size);
}

Mesh Mesh::create(const Environment& environment, MeshShape shape, at::Device device, std::chrono::milliseconds timeout) {
  check(ErrorKind::kUsage, device.is_cpu() || device.is_cuda(), "device ", device, " is neither a CPU nor a CUDA device");
  if (device.is_cuda()) {
    require_nccl(device);
  }
  if (environment.world_size == 1) {
    check_shape(shape, 1);
    return {};
  }
  Groups groups;
  if (has_mpi(environment, device)) {
    groups = make_mpi_groups(environment, shape, timeout);
  } else {
    check_shape(shape, environment.world_size);
  }
  if (device.is_cuda()) {
    groups = make_nccl_groups(environment, shape, device, timeout, groups);
  }
  return Mesh(shape, std::move(groups.world), std::move(groups.tp), std::move(groups.dp), std::move(groups.cp), std::move(groups.data));
}

Group create_world_group(const std::string& name, const Environment& environment, at::Device device, std::chrono::milliseconds timeout) {
  if (environment.world_size == 1) {
    return {};
  }
  if (has_mpi(environment, device)) {
    return make_mpi_world(name, environment, timeout);
  }
  return make_nccl_group(name, make_store(environment, {}, timeout), strided(0, environment.world_size, 1), environment.world_rank, device, timeout);
}

void Mesh::watch(const std::shared_ptr<Watchdog>& watchdog) {
  for (Group* group : {&world_, &tp_, &dp_, &cp_, &data_}) {
    group->watch(watchdog);
  }
}

void Mesh::count(const std::shared_ptr<Traffic>& traffic) {
  for (Group* group : {&world_, &tp_, &dp_, &cp_, &data_}) {
    group->count(traffic);
  }
}

Mesh::Mesh(MeshShape shape, Group world, Group tp, Group dp, Group cp, Group data)
    : shape_(shape), world_(std::move(world)), tp_(std::move(tp)), dp_(std::move(dp)), cp_(std::move(cp)), data_(std::move(data)) {
  check_same_shape(world_, shape);
  check_shape(shape, world_.size());
  const int64_t copy = world_.rank() / shape.tp;
  check_place(tp_, "tensor-parallel", world_.rank() % shape.tp, shape.tp);
  check_place(dp_, "data-parallel", copy / shape.cp, shape.dp);
  check_place(cp_, "context-parallel", copy % shape.cp, shape.cp);
  check_place(this->data(), "data", copy, shape.dp * shape.cp);
}

}  // namespace drrl
