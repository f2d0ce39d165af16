#pragma once

#include <cstdint>
#include <functional>
#include <future>
#include <optional>
#include <vector>

#include <ATen/ATen.h>

#include "distributed/collectives/group.h"

namespace drrl {

/// The way of rewards to a central trainer on rank 0, and of what it learned back to all, beside
/// the work of the processes: one round is a gather of every process's record, training on rank 0,
/// and a broadcast of the new weights. `post` starts gather and training and returns at once.
/// `take` is where the weights are wanted; called late enough after `post`, it finds them made and
/// only hands them out. Who takes at the same point of the same step on every process acts alike
/// everywhere.
///
/// Both collectives are started by the thread that calls post and take, so that their order among
/// those of other groups is the same on all processes, as NCCL demands. Over drrl's MPI backend
/// they are an MPI_Igatherv and an MPI_Ibcast, polled by the group's progress thread; over any
/// other c10d group its asynchronous gather, of records padded to the largest, and broadcast. The
/// group must be the channel's own: nothing else may travel on it meanwhile.
class RewardChannel {
 public:
  /// Rank 0's: all processes' records in rank order -> the new weights. Runs on a thread of the
  /// round's own, beside whatever the process does.
  using Train = std::function<at::Tensor(const std::vector<at::Tensor>& records)>;

  /// Collective over `group`. record: elements of this process's records, which may differ from
  /// process to process; weights: of what comes back. float64.
  RewardChannel(Group group, int64_t record, int64_t weights, Train train);
  RewardChannel(const RewardChannel&) = delete;
  RewardChannel& operator=(const RewardChannel&) = delete;

  /// Starts a round. Collective, but waits for nobody. Errors: c10::Error if a round is under way
  /// or the record is of another size.
  void post(const at::Tensor& record);

  bool under_way() const { return under_way_; }

  /// Ends the round: the same weights on every process. Collective. Errors: c10::Error if none is
  /// under way; on rank 0 what `train` threw, elsewhere then Error(kCommunication) after the
  /// group's timeout.
  at::Tensor take();

  /// What calls of `take` waited so far [ms].
  double waited_ms() const { return waited_ms_; }

 private:
  at::Tensor trained(std::vector<at::Tensor> records);  // on rank 0, once they are all there

  Group group_;
  int64_t record_;
  at::Tensor weights_;
  Train train_;
  std::vector<int64_t> sizes_;  // of all records as they travel
  bool under_way_ = false;
  double waited_ms_ = 0;
  at::Tensor sent_;
  Pending gather_;
  std::future<at::Tensor> round_;  // last: it must end before what it uses
};

}  // namespace drrl
