#include "distributed/topology/mesh.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "core/error.h"
#include "distributed/collectives/agreement.h"
#include "distributed/nccl/nccl_group.h"
#include "distributed/topology/rendezvous.h"
#ifdef DRRL_WITH_MPI
#include "distributed/mpi/mpi_group.h"
#endif

namespace drrl {
namespace {

struct Groups {
  Group world;
  Group tp;
  Group dp;
  Group cp = {};  // this and data only with cp > 1
  Group data = {};
  Group kv = {};  // only with tp > kv_heads
};

bool shares_kv_heads(MeshShape shape) {
  return shape.kv_heads > 0 && shape.tp > shape.kv_heads;
}

// World ranks, of those in this process's tensor-parallel group.
IndexRange kv_ranks(MeshShape shape, int64_t rank) {
  const IndexRange sharers = kv_sharers_of(shape.kv_heads, shape.tp, rank % shape.tp);
  return {rank - rank % shape.tp + sharers.begin, sharers.count};
}

std::string describe(MeshShape shape) {
  return c10::str("tp=", shape.tp, ", dp=", shape.dp) +
         (shape.cp == 1 ? std::string() : c10::str(", cp=", shape.cp)) +
         (shares_kv_heads(shape) ? c10::str(", KV heads=", shape.kv_heads) : std::string());
}

// Before anything that depends on it: ranks that were given different shapes would wait for each
// other in different groups.
void check_same_shape(const Group& world, MeshShape shape) {
  check_agreement(world, hash_bytes(describe(shape)),
                  c10::str("the mesh (", describe(shape), " here)"));
}

#ifdef DRRL_WITH_MPI
Group make_mpi_world(const std::string& name, const Environment& environment,
                     std::chrono::milliseconds timeout) {
  require_mpi();
  int size = 0;
  int rank = 0;
  check_mpi(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
  check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank");
  check(ErrorKind::kUsage, size == environment.world_size && rank == environment.world_rank,
        "MPI says rank ", rank, " of ", size, ", but ", drrl::name(environment.launcher),
        " says rank ", environment.world_rank, " of ", environment.world_size,
        " (a program linked to another MPI than its launcher's, or srun without --mpi=pmix?)");
  return make_mpi_group(name, MPI_COMM_WORLD, timeout);
}

Groups make_mpi_groups(const Environment& environment, MeshShape shape,
                       std::chrono::milliseconds timeout) {
  Groups groups;
  groups.world = make_mpi_world("world", environment, timeout);
  check_same_shape(groups.world, shape);
  check_shape(shape, environment.world_size);
  const int64_t rank = environment.world_rank,
                sequence = shape.tp * shape.cp;  // processes that share a sequence
  groups.tp = make_mpi_group("tp", MPI_COMM_WORLD, timeout, /*color=*/rank / shape.tp);
  groups.dp = make_mpi_group("dp", MPI_COMM_WORLD, timeout, /*color=*/rank % sequence);
  if (shape.cp > 1) {
    groups.cp = make_mpi_group("cp", MPI_COMM_WORLD, timeout,
                               /*color=*/rank / sequence * shape.tp + rank % shape.tp);
    groups.data = make_mpi_group("data", MPI_COMM_WORLD, timeout, /*color=*/rank % shape.tp);
  }
  if (shares_kv_heads(shape)) {
    groups.kv = make_mpi_group("kv", MPI_COMM_WORLD, timeout,
                               /*color=*/kv_ranks(shape, rank).begin);
  }
  return groups;
}
#else
Group make_mpi_world(const std::string& /*name*/, const Environment& environment,
                     std::chrono::milliseconds /*timeout*/) {
  raise(ErrorKind::kUsage, "started by ", name(environment.launcher), " as one of ",
        environment.world_size,
        " processes, but this drrl was built without MPI (DRRL_MPI=OFF): start it with torchrun, "
        "or build it with MPI");
}

Groups make_mpi_groups(const Environment& environment, MeshShape /*shape*/,
                       std::chrono::milliseconds timeout) {
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

Groups make_nccl_groups(const Environment& environment, MeshShape shape, at::Device device,
                        std::chrono::milliseconds timeout, const Groups& cpu) {
  const int64_t rank = environment.world_rank;
  const int64_t sequence = shape.tp * shape.cp;
  const auto store = make_store(environment, cpu.world, timeout);
  const auto group = [&](const char* name, int64_t first, int64_t count, int64_t stride,
                         const Group& beside) {
    return make_nccl_group(name, store, strided(first, count, stride), rank, device, timeout,
                           beside);
  };
  Groups groups{group("world", 0, environment.world_size, 1, cpu.world),
                group("tp", rank - rank % shape.tp, shape.tp, 1, cpu.tp),
                group("dp", rank % sequence, shape.dp, sequence, cpu.dp)};
  if (shape.cp > 1) {
    groups.cp = group("cp", rank - rank % sequence + rank % shape.tp, shape.cp, shape.tp, cpu.cp);
    groups.data = group("data", rank % shape.tp, shape.dp * shape.cp, shape.tp, cpu.data);
  }
  if (shares_kv_heads(shape)) {
    const IndexRange sharers = kv_ranks(shape, rank);
    groups.kv = group("kv", sharers.begin, sharers.count, 1, cpu.kv);
  }
  return groups;
}

// Whether the launcher has brought up MPI. Errors: Error(kUsage) for CPU tensors where it has not.
bool has_mpi(const Environment& environment, at::Device device) {
  const bool mpi = environment.launcher != Launcher::kTorchrun;
  check(ErrorKind::kUsage, mpi || device.is_cuda(),
        "CPU tensors have no groups under torchrun (LibTorch's C++ headers come without Gloo): "
        "start the program with mpirun, "
        "or hand in groups of your own");
  return mpi;
}

void check_place(const Group& group, const char* role, int64_t rank, int64_t size) {
  check(ErrorKind::kUsage, group.rank() == rank && group.size() == size, "the ", role, " group '",
        group.name(), "' has this process as rank ", group.rank(), " of ", group.size(),
        ", expected rank ", rank, " of ", size, " (tp varies fastest, then cp)");
}

}  // namespace

IndexRange partition(int64_t n, int64_t parts, int64_t index) {
  check(ErrorKind::kInternal, n >= 0 && parts >= 1 && index >= 0 && index < parts, "partition(", n,
        ", ", parts, ", ", index, ")");
  const int64_t each = n / parts;
  const int64_t more = n % parts;
  return {index * each + std::min(index, more), each + (index < more ? 1 : 0)};
}

IndexRange kv_heads_of(int64_t kv_heads, int64_t tp, int64_t rank) {
  check(ErrorKind::kInternal, kv_heads >= 1 && rank >= 0 && rank < tp, "KV heads of rank ", rank,
        " of ", tp, ", of ", kv_heads);
  if (tp <= kv_heads) {
    return partition(kv_heads, tp, rank);
  }
  int64_t head = 0;
  for (IndexRange held = partition(tp, kv_heads, 0); held.begin + held.count <= rank;
       held = partition(tp, kv_heads, head)) {
    ++head;
  }
  return {head, 1};
}

IndexRange kv_sharers_of(int64_t kv_heads, int64_t tp, int64_t rank) {
  return tp <= kv_heads ? IndexRange{rank, 1}
                        : partition(tp, kv_heads, kv_heads_of(kv_heads, tp, rank).begin);
}

void check_shape(MeshShape shape, int64_t world_size) {
  check(ErrorKind::kUsage, shape.tp >= 1 && shape.dp >= 1 && shape.cp >= 1 && shape.kv_heads >= 0,
        "tp=", shape.tp, ", dp=", shape.dp, " and cp=", shape.cp,
        " must be at least 1, KV heads not negative, got ", shape.kv_heads);
  // Divided, not multiplied: the product may overflow.
  check(ErrorKind::kUsage,
        world_size % shape.tp == 0 && world_size / shape.tp % shape.cp == 0 &&
            world_size / shape.tp / shape.cp == shape.dp,
        "tp=", shape.tp, " times dp=", shape.dp,
        shape.cp == 1 ? std::string() : c10::str(" times cp=", shape.cp),
        " is not the world size of ", world_size);
}

Mesh Mesh::create(const Environment& environment, MeshShape shape, at::Device device,
                  std::chrono::milliseconds timeout) {
  check(ErrorKind::kUsage, device.is_cpu() || device.is_cuda(), "device ", device,
        " is neither a CPU nor a CUDA device");
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
  return Mesh(shape, std::move(groups.world), std::move(groups.tp), std::move(groups.dp),
              std::move(groups.cp), std::move(groups.data), std::move(groups.kv));
}

Group create_world_group(const std::string& name, const Environment& environment, at::Device device,
                         std::chrono::milliseconds timeout) {
  if (environment.world_size == 1) {
    return {};
  }
  if (has_mpi(environment, device)) {
    return make_mpi_world(name, environment, timeout);
  }
  return make_nccl_group(name, make_store(environment, {}, timeout),
                         strided(0, environment.world_size, 1), environment.world_rank, device,
                         timeout);
}

TextExchange exchange_over_torchrun(const Environment& environment,
                                    std::chrono::milliseconds timeout) {
  static std::atomic<int64_t> exchanges{0};
  return exchange_over(make_store(environment, {}, timeout), c10::str("exchange ", ++exchanges),
                       environment);
}

void Mesh::watch(const std::shared_ptr<Watchdog>& watchdog) {
  for (Group* group : {&world_, &tp_, &dp_, &cp_, &data_, &kv_}) {
    group->watch(watchdog);
  }
}

void Mesh::count(const std::shared_ptr<Traffic>& traffic) {
  for (Group* group : {&world_, &tp_, &dp_, &cp_, &data_, &kv_}) {
    group->count(traffic);
  }
}

Mesh::Mesh(MeshShape shape, Group world, Group tp, Group dp, Group cp, Group data, Group kv)
    : shape_(shape),
      world_(std::move(world)),
      tp_(std::move(tp)),
      dp_(std::move(dp)),
      cp_(std::move(cp)),
      data_(std::move(data)),
      kv_(std::move(kv)) {
  check_same_shape(world_, shape);
  check_shape(shape, world_.size());
  const int64_t copy = world_.rank() / shape.tp;
  check_place(tp_, "tensor-parallel", world_.rank() % shape.tp, shape.tp);
  check_place(dp_, "data-parallel", copy / shape.cp, shape.dp);
  check_place(cp_, "context-parallel", copy % shape.cp, shape.cp);
  check_place(this->data(), "data", copy, shape.dp * shape.cp);
  const IndexRange sharers = shares_kv_heads(shape) ? kv_ranks(shape, world_.rank())
                                                    : IndexRange{world_.rank(), 1};
  check_place(kv_, "KV", world_.rank() - sharers.begin, sharers.count);
}

}  // namespace drrl
