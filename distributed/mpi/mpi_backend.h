#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "distributed/mpi/mpi_communicator.h"
#include "distributed/mpi/mpi_progress.h"

namespace drrl {

struct MpiOptions : c10d::Backend::Options {
  explicit MpiOptions(std::string group, std::chrono::milliseconds timeout_)
      : Options("mpi", timeout_) {
    group_name = std::move(group);
  }

  /// Most elements in one MPI call, whose counts are 32-bit (and, in sums over members, have
  /// overflowed in some MPI releases).
  int64_t max_elements = int64_t{1} << 30;

  /// All-reduces from this size on run as a ring of messages, smaller ones as MPI_Iallreduce. On
  /// two ranks over shared memory the ring is 1.5 to 2 times as fast from 256 KiB on; at 1 KiB it
  /// is half as fast on four.
  int64_t ring_bytes = 128 * 1024;
};

/// Open MPI as a backend of c10d: collectives on CPU tensors, asynchronous, with enforced timeouts.
///
/// It owns its communicator, and its progress thread (mpi_progress.h) runs the operations in the
/// order in which they were called; sends and receives run beside the collectives. MPI is
/// initialised with MPI_THREAD_MULTIPLE by the program, and the backend is destroyed, on all
/// members in the same order, before MPI_Finalize.
///
/// Tensors: CPU, contiguous. Reductions (sum, product, min, max): float32, float64, bfloat16,
/// int32, int64, uint8. bfloat16 is reduced in float32 and rounded once, at the end. MPI's min and
/// max may drop a NaN; sum keeps it. Everything else moves any dtype of 1, 2, 4 or 8 bytes. All
/// members hold bit-equal results of an all-reduce.
///
/// Errors: c10::Error at the call for tensors that break the contract; from Work::wait,
/// Error(kCommunication) that names the world rank, group, operation, number and age.
class MpiBackend final : public c10d::Backend {
 public:
  MpiBackend(MpiCommunicator communicator, c10::intrusive_ptr<MpiOptions> options);
  ~MpiBackend() override;

  const std::string getBackendName() const override { return "mpi"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options_; }
  void setTimeout(std::chrono::milliseconds timeout) override { options_->timeout = timeout; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return progress_->collectives(); }

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override;
  c10::intrusive_ptr<c10d::Work> reduce(std::vector<at::Tensor>& tensors,
                                        const c10d::ReduceOptions& options) override;
  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override;
  /// The members' tensors may differ in size.
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& options) override;
  /// The members' tensors may differ in size while each fits into one piece, max_elements /
  /// members.
  c10::intrusive_ptr<c10d::Work> gather(std::vector<std::vector<at::Tensor>>& outputs,
                                        std::vector<at::Tensor>& inputs,
                                        const c10d::GatherOptions& options) override;
  /// The members' shares may differ in size.
  c10::intrusive_ptr<c10d::Work> reduce_scatter(std::vector<at::Tensor>& outputs,
                                                std::vector<std::vector<at::Tensor>>& inputs,
                                                const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override;
  /// Split sizes count rows of dimension 0; empty means equal shares.
  c10::intrusive_ptr<c10d::Work> alltoall_base(at::Tensor& output, at::Tensor& input,
                                               std::vector<int64_t>& output_splits,
                                               std::vector<int64_t>& input_splits,
                                               const c10d::AllToAllOptions& options) override;
  c10::intrusive_ptr<c10d::Work> send(std::vector<at::Tensor>& tensors, int destination,
                                      int tag) override;
  c10::intrusive_ptr<c10d::Work> recv(std::vector<at::Tensor>& tensors, int source,
                                      int tag) override;
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override;

 private:
  MpiOperation operation(c10d::OpType type, std::string description,
                         std::chrono::milliseconds timeout) const;
  void append_all_reduce(MpiOperation& operation, const at::Tensor& buffer, MPI_Op op) const;

  MpiCommunicator communicator_;
  c10::intrusive_ptr<MpiOptions> options_;
  std::unique_ptr<MpiProgress>
      progress_;  // after the communicator: the thread ends before it is freed
};

}  // namespace drrl
