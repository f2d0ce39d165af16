#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include <ATen/ATen.h>

#include "core/types/index_range.h"
#include "distributed/collectives/agreement.h"
#include "distributed/collectives/group.h"
#include "distributed/topology/environment.h"

namespace drrl {

/// How the world is divided: tp processes share one copy of the model, cp copies work on parts of
/// the same sequences, dp such sets train on different data.
struct MeshShape {
  int64_t tp = 1;
  int64_t dp = 1;
  int64_t cp = 1;
  int64_t kv_heads = 0;  ///< of the model; 0: at least tp. With more processes than that, some hold
                         ///< the same one, and share out its query heads
};

/// The share of one of `parts` processes in `n` things: as even as possible, the first ones get one
/// more.
IndexRange partition(int64_t n, int64_t parts, int64_t index);

/// The KV heads of tensor-parallel rank `rank` of `tp`: a share of them; or one, if there are fewer
/// than processes.
IndexRange kv_heads_of(int64_t kv_heads, int64_t tp, int64_t rank);
/// The tensor-parallel ranks that hold the KV heads of `rank`, itself among them: one alone unless
/// there are more ranks than KV heads. They are neighbours: 3 KV heads on 4 ranks are held by {0 1}
/// {2} {3}.
IndexRange kv_sharers_of(int64_t kv_heads, int64_t tp, int64_t rank);

/// The processes as a dp x cp x tp grid: world rank = (dp_rank * cp + cp_rank) * tp + tp_rank, so a
/// tensor-parallel group sits on neighbouring ranks. Gradients and losses are summed over `data`,
/// all copies of this process's share of the model: cp varies faster than dp; with cp = 1 it is dp.
/// `kv` are the processes of a tp group that hold the same KV head (kv_sharers_of); one, unless tp
/// > kv_heads.
///
///   tp = 2, dp = 3, cp = 1:    tp groups {0 1} {2 3} {4 5},          dp groups {0 2 4} {1 3 5}
///   tp = 2, dp = 2, cp = 2:    tp groups {0 1} {2 3} {4 5} {6 7},
///                              cp groups {0 2} {1 3} {4 6} {5 7},
///                              dp groups {0 4} {1 5} {2 6} {3 7},
///                              data groups {0 2 4 6} {1 3 5 7}
///
/// Mesh owns its groups, and must be gone before MPI_Finalize. Default-constructed: one process.
class Mesh {
 public:
  Mesh() = default;

  /// Makes the groups: over Open MPI for CPU tensors, over NCCL for tensors on a CUDA `device`
  /// (with Open MPI beside it for CPU tensors, except under torchrun). Collective over the world.
  /// With MPI, the program has called MPI_Init_thread(MPI_THREAD_MULTIPLE).
  ///
  /// Errors: Error(kUsage) when tp * dp * cp is not the world size, when MPI is needed and not
  /// active, when MPI's world is not the environment's, for CPU tensors under torchrun (hand in
  /// groups instead), or without a usable GPU; Error(kCommunication) when the processes were given
  /// different shapes.
  static Mesh create(const Environment& environment, MeshShape shape, at::Device device,
                     std::chrono::milliseconds timeout);

  /// Of groups that a host program made; cp and data only if shape.cp > 1, kv only if shape.tp >
  /// shape.kv_heads. Collective over `world`. Errors: Error(kUsage) unless their sizes and ranks
  /// are those of the grid above; Error(kCommunication) when the processes were given different
  /// shapes.
  Mesh(MeshShape shape, Group world, Group tp, Group dp, Group cp = {}, Group data = {},
       Group kv = {});

  /// See Group::watch; for all groups. Before copies of them are handed out.
  void watch(const std::shared_ptr<Watchdog>& watchdog);
  /// See Group::count; likewise.
  void count(const std::shared_ptr<Traffic>& traffic);

  const MeshShape& shape() const noexcept { return shape_; }
  const Group& world() const noexcept { return world_; }
  const Group& tp() const noexcept { return tp_; }
  const Group& dp() const noexcept { return dp_; }
  const Group& cp() const noexcept { return cp_; }
  const Group& data() const noexcept { return shape_.cp == 1 ? dp_ : data_; }
  const Group& kv() const noexcept { return kv_; }

 private:
  MeshShape shape_;
  Group world_;
  Group tp_;
  Group dp_;
  Group cp_;
  Group data_;
  Group kv_;
};

/// Another group of all processes, with communicators of its own, for traffic beside the mesh's:
/// over Open MPI for CPU tensors, under torchrun over NCCL for tensors on `device`. Collective over
/// the world; one process gets a group of one. Errors: as Mesh::create.
Group create_world_group(const std::string& name, const Environment& environment, at::Device device,
                         std::chrono::milliseconds timeout);

/// Under torchrun, an exchange between all processes before there is a mesh: through its store,
/// without a GPU. Collective over the world. Errors: as Mesh::create; and as exchange_over
/// (rendezvous.h).
TextExchange exchange_over_torchrun(const Environment& environment,
                                    std::chrono::milliseconds timeout);

/// Errors: Error(kUsage), naming the numbers, unless tp, dp, cp >= 1, kv_heads >= 0 and tp * dp *
/// cp == world_size.
void check_shape(MeshShape shape, int64_t world_size);

}  // namespace drrl
