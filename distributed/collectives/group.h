#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>

#include "distributed/collectives/traffic.h"
#include "distributed/collectives/watchdog.h"

namespace c10d {
class ProcessGroup;
class Work;
}  // namespace c10d

namespace drrl {

class CountedCall;

enum class ReduceOp { kSum, kMax, kMin };

/// A handle on a collective that is still under way. Destroying an unfinished one waits for it; an
/// error then is only logged.
class Pending {
 public:
  Pending() = default;
  explicit Pending(std::function<void()> wait) : wait_(std::move(wait)) {}
  Pending(Pending&& other) noexcept : wait_(std::exchange(other.wait_, nullptr)) {}
  Pending& operator=(Pending&& other) noexcept;
  Pending(const Pending&) = delete;
  Pending& operator=(const Pending&) = delete;
  ~Pending();

  /// Waits for completion (on CUDA: makes the current stream wait). Errors: Error(kCommunication)
  /// naming rank, group and operation.
  void wait();

 private:
  std::function<void()> wait_;
};

/// A named set of processes, and the collectives drrl uses on it. The only face of communication
/// for the layers above: the same code runs over NCCL (CUDA tensors), Open MPI (CPU tensors) or a
/// group handed in by a host program, because all three are a `c10d::ProcessGroup`.
///
/// A default-constructed Group is the group of one process: every collective on it is the identity
/// and touches nothing. Tensors must be contiguous; dtypes float32, float64, bfloat16, int32,
/// int64, uint8. Every call is collective: all members make the same calls in the same order with
/// the same shapes. Empty tensors need no communication and cause none. Autograd does not see
/// collectives. Groups are cheap to copy; all copies share one process group.
///
/// Errors: c10::Error for tensors that break the contract; Error(kCommunication) that names the
/// world rank, the group, the operation and, on a timeout, the age; never a silent hang. After such
/// an error the group is of no use any more, and over MPI the process should end with MPI_Abort:
/// MPI_Finalize may wait for the members that never came.
class Group {
 public:
  Group();

  /// Wraps `process_group` (shared ownership; null: a group of one). `name` is used in messages
  /// ("tp", "dp", "world"), and so are `world_ranks`, the members' ranks in the world in the order
  /// of their ranks here, where they are known. The timeout holds for each collective from its
  /// start (NCCL enforces its own, given at creation; a message has that of the process group).
  Group(std::string name, c10::intrusive_ptr<c10d::ProcessGroup> process_group,
        std::chrono::milliseconds timeout, std::vector<int64_t> world_ranks = {});

  // Out of line, so that users of this header need not compile c10d's.
  Group(const Group& other);
  Group(Group&& other) noexcept;
  Group& operator=(const Group& other);
  Group& operator=(Group&& other) noexcept;
  ~Group();

  const std::string& name() const noexcept { return name_; }
  int64_t rank() const noexcept { return rank_; }
  int64_t size() const noexcept { return size_; }
  const c10::intrusive_ptr<c10d::ProcessGroup>& process_group() const noexcept {
    return process_group_;
  }

  /// "world rank 3, group 'tp' (rank 1 of 2)": how messages name this member, or `rank`, another
  /// one.
  std::string describe() const { return describe(rank_); }
  std::string describe(int64_t rank) const;

  /// From now on `watchdog` notes and watches this group's collectives, and those of copies that
  /// are made of it.
  void watch(std::shared_ptr<Watchdog> watchdog) { watchdog_ = std::move(watchdog); }
  const std::shared_ptr<Watchdog>& watchdog() const noexcept { return watchdog_; }

  /// The same for `traffic`, which counts them.
  void count(std::shared_ptr<Traffic> traffic) { traffic_ = std::move(traffic); }
  const std::shared_ptr<Traffic>& traffic() const noexcept { return traffic_; }

  /// What this process has sent in the collectives of this group and its copies so far, in bytes:
  /// message times bus_factor; of all_to_all, gather and send what does leave it. One counter for
  /// all who want to know what a piece of work sends: read it before and after.
  int64_t sent_bytes() const noexcept { return sent_bytes_ ? sent_bytes_->load() : 0; }

  std::chrono::milliseconds timeout() const noexcept { return timeout_; }

  /// Where small tensors of the program's own bookkeeping should live to travel in this group: the
  /// CPU if it has a CPU backend.
  at::Device message_device() const;

  /// tensor <- reduce over members of tensor. bfloat16 over MPI is summed in float32. Results are
  /// bit-equal on all members.
  void all_reduce(at::Tensor& tensor, ReduceOp op = ReduceOp::kSum) const;
  Pending all_reduce_async(at::Tensor& tensor, ReduceOp op = ReduceOp::kSum) const;

  /// input [n, ...] on each member -> output [size * n, ...], members in rank order.
  void all_gather(at::Tensor& output, const at::Tensor& input) const;
  Pending all_gather_async(at::Tensor& output, const at::Tensor& input) const;

  /// As all_gather, but member i contributes its own number of rows (0 too); returns the
  /// concatenation along dimension 0.
  at::Tensor all_gather_uneven(const at::Tensor& input) const;
  /// With rows[i] those of member i, which all members know: one message less, and on CUDA no wait.
  /// Errors: c10::Error if `input` has other rows.
  at::Tensor all_gather_uneven(const at::Tensor& input, at::IntArrayRef rows) const;

  /// input [size * n, ...] -> output [n, ...]: the i-th slice of the sum over members on member i.
  void reduce_scatter(at::Tensor& output, const at::Tensor& input) const;

  /// Member i's share j of its flat input [sum of sends] becomes member j's share i of its output
  /// [sum of receives]; sends[j] and receives[i] are elements, 0 too. Input and output must outlive
  /// the handle.
  Pending all_to_all_async(at::Tensor& output, const std::vector<int64_t>& receives,
                           const at::Tensor& input, const std::vector<int64_t>& sends) const;

  /// tensor <- tensor of `root` (a rank of this group).
  void broadcast(at::Tensor& tensor, int64_t root = 0) const;
  Pending broadcast_async(at::Tensor& tensor, int64_t root = 0) const;

  /// The tensors of all members in rank order on `root`, empty elsewhere. Equal shapes.
  std::vector<at::Tensor> gather(const at::Tensor& tensor, int64_t root = 0) const;
  /// The same into tensors that the root brings, one for each member (elsewhere: none). Over drrl's
  /// MPI backend their sizes may differ.
  Pending gather_async(std::vector<at::Tensor> outputs, const at::Tensor& tensor,
                       int64_t root = 0) const;

  void send(const at::Tensor& tensor, int64_t destination, int tag = 0) const;
  void receive(at::Tensor& tensor, int64_t source, int tag = 0) const;

  void barrier() const;

 private:
  friend class CountedCall;  // group.cpp

  std::string name_ = "self";
  c10::intrusive_ptr<c10d::ProcessGroup> process_group_;
  std::chrono::milliseconds timeout_{0};
  std::vector<int64_t> world_ranks_;
  std::shared_ptr<Watchdog> watchdog_;
  std::shared_ptr<Traffic> traffic_;
  std::shared_ptr<std::atomic<int64_t>> sent_bytes_;  // null: a group of one
  int64_t rank_ = 0;
  int64_t size_ = 1;
};

}  // namespace drrl
