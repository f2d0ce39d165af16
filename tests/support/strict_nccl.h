#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <mpi.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "distributed/topology/mesh.h"

namespace drrl {

/// What one process asked of all its groups, in the order in which it asked, and an error on
/// demand.
struct Journal {
  struct Call {
    std::set<int64_t> members;  ///< world ranks of the group
    std::string what;           ///< group, operation and all in which members must agree
  };
  std::vector<Call> calls;
  std::set<std::thread::id> threads;  ///< that asked
  std::vector<std::string> refused;   ///< what NCCL does not do
  int64_t fail_at = -1;               ///< number of the call that fails, counted from 0; none: -1
  size_t fail_members = 0;            ///< of groups with so many members alone; 0: of all groups
  int64_t counted = 0;                ///< calls of those groups so far
  bool fail_in_wait = false;  ///< when its result is waited for, as after a communicator was
                              ///< aborted; else when it is started
};

/// Stands where NCCL will: drrl's MPI backend under NCCL's rules. It takes contiguous tensors of
/// NCCL's types, gathers equal shapes only, knows no tags, and demands that the members of a group
/// ask for the same in the same order; so do, among all groups that they share, any two processes,
/// or kernels that wait for each other on two GPUs could be queued crosswise.
class StrictNccl final : public c10d::Backend {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  StrictNccl(std::string name, std::set<int64_t> members, const Group& inner,
             std::shared_ptr<Journal> journal)
      : Backend(static_cast<int>(inner.rank()), static_cast<int>(inner.size())),
        name_(std::move(name)),
        members_(std::move(members)),
        inner_(inner.process_group()->getBackend(at::kCPU)),
        journal_(std::move(journal)) {}

  const std::string getBackendName() const override { return "strict"; }

  WorkPtr allreduce(std::vector<at::Tensor>& tensors,
                    const c10d::AllreduceOptions& options) override {
    return noted("all_reduce", tensors, true, static_cast<int64_t>(options.reduceOp),
                 [&] { return inner_->allreduce(tensors, options); });
  }
  WorkPtr broadcast(std::vector<at::Tensor>& tensors,
                    const c10d::BroadcastOptions& options) override {
    return noted("broadcast", tensors, true, options.rootRank,
                 [&] { return inner_->broadcast(tensors, options); });
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input,
                          const c10d::AllgatherOptions& options) override {
    return noted("all_gather", {input, output}, true, 0,
                 [&] { return inner_->_allgather_base(output, input, options); });
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    return noted("reduce_scatter", {output, input}, true, static_cast<int64_t>(options.reduceOp),
                 [&] { return inner_->_reduce_scatter_base(output, input, options); });
  }
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& to,
                        std::vector<int64_t>& from, const c10d::AllToAllOptions& options) override {
    return noted("all_to_all", {input, output}, false, 0,
                 [&] { return inner_->alltoall_base(output, input, to, from, options); });
  }
  WorkPtr gather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                 const c10d::GatherOptions& options) override {
    for (const auto& list : outputs) {
      for (const at::Tensor& output : list) {
        if (output.sizes() != inputs.front().sizes()) {
          journal_->refused.push_back(
              c10::str("gather of ", inputs.front().sizes(), " and ", output.sizes()));
        }
      }
    }
    return noted("gather", inputs, true, options.rootRank,
                 [&] { return inner_->gather(outputs, inputs, options); });
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    return noted("barrier", {}, true, 0, [&] { return inner_->barrier(options); });
  }

 private:
  class FailsInWait final : public c10d::Work {
   public:
    explicit FailsInWait(WorkPtr inner) : inner_(std::move(inner)) {}
    bool wait(std::chrono::milliseconds timeout) override {
      inner_->wait(timeout);
      throw std::runtime_error("NCCL communicator was aborted");
    }

   private:
    WorkPtr inner_;
  };

  template <typename Start>
  WorkPtr noted(const char* operation, const std::vector<at::Tensor>& tensors, bool equal_sizes,
                int64_t detail, const Start& start) {
    std::string what = c10::str(name_, " ", operation, " ", detail);
    for (const at::Tensor& x : tensors) {
      what += c10::str(" ", x.scalar_type(), equal_sizes ? c10::str(" x ", x.numel()) : "");
      const auto types = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kInt,
                          at::kLong,  at::kByte,   at::kChar,     at::kBool};
      if (!x.is_contiguous() ||
          std::find(types.begin(), types.end(), x.scalar_type()) == types.end()) {
        journal_->refused.push_back(what);
      }
    }
    const bool counts = journal_->fail_members == 0 || journal_->fail_members == members_.size();
    const bool fails = counts && journal_->counted == journal_->fail_at;
    journal_->counted += counts ? 1 : 0;
    journal_->calls.push_back({members_, what});
    journal_->threads.insert(std::this_thread::get_id());
    if (fails && !journal_->fail_in_wait) {
      throw std::runtime_error("NCCL error: remote process exited or there was a network error");
    }
    const WorkPtr work = start();
    return fails ? WorkPtr(c10::make_intrusive<FailsInWait>(work)) : work;
  }

  std::string name_;
  std::set<int64_t> members_;
  c10::intrusive_ptr<c10d::Backend> inner_;
  std::shared_ptr<Journal> journal_;
};

/// The group with StrictNccl between. Collective over it.
inline Group over_strict_nccl(const Group& inner, const std::shared_ptr<Journal>& journal) {
  if (inner.size() == 1) {
    return inner;
  }
  int world_rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
  at::Tensor all = at::empty({inner.size()}, at::kLong);
  inner.all_gather(all, at::full({1}, world_rank, at::kLong));
  const std::vector<int64_t> members(all.const_data_ptr<int64_t>(),
                                     all.const_data_ptr<int64_t>() + all.numel());
  const auto group = c10::make_intrusive<c10d::ProcessGroup>(static_cast<int>(inner.rank()),
                                                             static_cast<int>(inner.size()));
  const std::string name = c10::str(inner.name(), " of ", at::IntArrayRef(members));
  group->setBackend(at::kCPU, c10d::ProcessGroup::BackendType::CUSTOM,
                    c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<StrictNccl>(
                        name, std::set<int64_t>(members.begin(), members.end()), inner, journal)));
  group->setDefaultBackend(c10d::ProcessGroup::BackendType::CUSTOM);
  return Group(inner.name(), group, inner.timeout(), members);
}

inline Mesh over_strict_nccl(const Mesh& inner, const std::shared_ptr<Journal>& journal) {
  const auto strict = [&](const Group& group) { return over_strict_nccl(group, journal); };
  return Mesh(inner.shape(), strict(inner.world()), strict(inner.tp()), strict(inner.dp()),
              strict(inner.cp()), inner.shape().cp > 1 ? strict(inner.data()) : Group(),
              strict(inner.kv()));
}

/// Any two processes made the same calls in the same order on the groups that both are in, each
/// process from one thread, and nothing that NCCL refuses. Collective over MPI_COMM_WORLD.
inline void expect_nccls_rules_kept(const Journal& journal) {
  EXPECT_GT(journal.calls.size(), 0U);
  EXPECT_LE(journal.threads.size(), 1U) << "two threads call collectives";
  for (const std::string& refused : journal.refused) {
    ADD_FAILURE() << refused;
  }
  int rank = 0, size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  // For each other process the calls on groups that it is in too, as text, against what it has for
  // this one.
  const auto places = static_cast<size_t>(size);
  std::string mine;
  std::vector<int> lengths(places), begins(places), their_lengths(places), their_begins(places);
  for (int other = 0; other < size; ++other) {
    begins[other] = static_cast<int>(mine.size());
    for (const Journal::Call& call : journal.calls) {
      mine += other != rank && call.members.count(other) > 0 ? call.what + "\n" : "";
    }
    lengths[other] = static_cast<int>(mine.size()) - begins[other];
  }
  MPI_Alltoall(lengths.data(), 1, MPI_INT, their_lengths.data(), 1, MPI_INT, MPI_COMM_WORLD);
  std::partial_sum(their_lengths.begin(), their_lengths.end() - 1, their_begins.begin() + 1);
  std::string theirs(static_cast<size_t>(their_begins.back() + their_lengths.back()), ' ');
  MPI_Alltoallv(mine.data(), lengths.data(), begins.data(), MPI_CHAR, theirs.data(),
                their_lengths.data(), their_begins.data(), MPI_CHAR, MPI_COMM_WORLD);
  for (int other = 0; other < size; ++other) {
    const std::string a = mine.substr(begins[other], lengths[other]),
                      b = theirs.substr(their_begins[other], their_lengths[other]);
    const auto part = static_cast<size_t>(
        std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
    EXPECT_TRUE(a == b) << "processes " << rank << " and " << other << " part at\n  "
                        << a.substr(part, 200) << "\nand\n  " << b.substr(part, 200);
  }
}

}  // namespace drrl
