#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>
#include <mpi.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

namespace drrl {

/// The nonblocking MPI requests of one step.
struct MpiRequests {
  std::vector<MPI_Request> pending;   ///< to be completed before the next step
  std::vector<MPI_Status> completed;  ///< of the step before

  /// Where the next MPI_I... call puts its request; valid for that call.
  MPI_Request* add() { return &pending.emplace_back(MPI_REQUEST_NULL); }
};

/// One step of an operation: posts requests, never blocks. A step may post none and only compute.
using MpiStep = std::function<void(MpiRequests&)>;

/// A collective or a message, as a sequence of steps: each begins when the requests of the one
/// before are complete. Whatever memory the steps touch must be kept alive by what they capture.
struct MpiOperation {
  c10d::OpType type = c10d::OpType::UNKNOWN;
  std::string description;  ///< for messages: "all_reduce(sum) of 1024 x Float"
  std::vector<at::Tensor> outputs;
  std::vector<MpiStep> steps;
  std::chrono::milliseconds timeout{0};
  std::size_t bytes = 0;  ///< moved; decides how long the thread polls eagerly
};

class MpiWork;

/// The thread that drives the operations of one communicator.
///
/// Collectives run one at a time in the order of `submit`; sends and receives start at once, beside
/// them. The thread polls MPI_Testall: eagerly for 0.2 ms and as long as the data needs at 1 GB/s,
/// then in naps of 1/16 of the time already waited, at most 1 ms, so that short operations have low
/// latency and long waits leave the core to others. With nothing to do it sleeps.
///
/// When an operation is not complete `timeout` after its first step, or MPI reports an error, that
/// operation fails with Error(kCommunication) naming `owner`, the operation, its number and its
/// age, and so does everything submitted later: an MPI collective cannot be taken back, so the
/// communicator is lost. Its buffers stay allocated, since MPI may still write to them.
class MpiProgress {
 public:
  /// `owner` opens every message: "world rank 3, group 'tp' (rank 1 of 2)". `group` names the
  /// thread.
  MpiProgress(std::string owner, const std::string& group, int rank);

  /// Waits for what was submitted. Must not run after MPI_Finalize while operations are under way.
  ~MpiProgress();

  MpiProgress(const MpiProgress&) = delete;
  MpiProgress& operator=(const MpiProgress&) = delete;

  c10::intrusive_ptr<c10d::Work> submit(MpiOperation operation);

  /// Collectives submitted so far: equal on all members, or they have diverged.
  uint64_t collectives() const;

  /// True once an operation has failed: the communicator must not be used or freed any more.
  bool failed() const;

 private:
  using WorkPtr = c10::intrusive_ptr<MpiWork>;

  void run();
  bool take_work(std::vector<WorkPtr>& active);
  void fail(std::vector<WorkPtr>& active, const MpiWork& culprit, const std::string& reason);
  void nap(std::chrono::steady_clock::time_point last_advance, std::size_t bytes);

  const std::string owner_;
  const int rank_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<WorkPtr> collectives_;
  std::deque<WorkPtr> messages_;
  uint64_t collective_count_ = 0;
  uint64_t message_count_ = 0;
  std::string failure_;  // what broke the communicator; empty while it is whole
  bool stop_ = false;

  // The last time the thread took a turn; shared with works, which may outlive this object.
  std::shared_ptr<std::atomic<int64_t>> heartbeat_;
  std::thread thread_;
};

}  // namespace drrl
