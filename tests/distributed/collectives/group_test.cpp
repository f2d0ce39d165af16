// What needs no second process: the group of one, the translation of a backend's errors, and
// refusals.
#include "distributed/collectives/group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "core/error.h"
#include "distributed/collectives/agreement.h"
#include "distributed/mpi/mpi_group.h"
#include "distributed/nccl/nccl_group.h"
#include "distributed/topology/mesh.h"
#include "tests/support/error_of.h"

namespace drrl {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;

TEST(GroupOfOne, IsTheIdentity) {
  const Group group;
  EXPECT_EQ(group.rank(), 0);
  EXPECT_EQ(group.size(), 1);
  at::Tensor x = at::arange(6, at::kFloat).view({3, 2});
  const at::Tensor before = x.clone();
  group.all_reduce(x);
  group.broadcast(x);
  group.barrier();
  EXPECT_TRUE(x.equal(before));
  at::Tensor y = at::empty({3, 2});
  group.all_gather(y, x);
  EXPECT_TRUE(y.equal(before));
  y.zero_();
  group.reduce_scatter(y, x);
  EXPECT_TRUE(y.equal(before));
  EXPECT_TRUE(group.all_gather_uneven(x).equal(before));
  const auto gathered = group.gather(x);
  ASSERT_EQ(gathered.size(), 1);
  EXPECT_TRUE(gathered[0].equal(before));
  check_agreement(group, 5, "nothing");
}

TEST(Disagreement, NamesFactsValuesAndRanks) {
  const Facts lr = {{"--lr", "0.1"}, {"--seed", "1"}};
  EXPECT_EQ(disagreement({lr, lr, lr}), "");
  EXPECT_EQ(disagreement({lr, {{"--lr", "0.2"}, {"--seed", "1"}}, lr}),
            "--lr is 0.1 on ranks 0 2, 0.2 on rank 1");
  EXPECT_EQ(disagreement({{{"text", "8 bytes", "/a"}}, {{"text", "9 bytes", "/b"}}}),
            "text is 8 bytes (/a) on rank 0, 9 bytes (/b) on rank 1");
  EXPECT_EQ(disagreement({{{"text", "8 bytes", "/a"}}, {{"text", "8 bytes", "/b"}}}), "")
      << "where it is does not matter";
  EXPECT_EQ(disagreement({{{"shard 0", "a"}}, {{"shard 1", "b"}}, {{"shard 0", "c"}}}),
            "shard 0 is a on rank 0, c on rank 2");
  EXPECT_EQ(disagreement({{{"--output", ""}}, {{"--output", "a\nb"}}}),
            "--output is empty on rank 0, \"a\\x0ab\" on rank 1");
  std::vector<Facts> many(9, {{"--lr", "0"}});
  for (const size_t rank : {size_t{1}, size_t{2}, size_t{3}}) {
    many[rank][0].value = std::to_string(rank);
  }
  EXPECT_EQ(
      disagreement(many),
      "--lr is 0 on ranks 0 4 5 6 and 2 more, 1 on rank 1, 2 on rank 2, 1 other values elsewhere");
  const Facts a = {{"1", "a"}, {"2", "a"}, {"3", "a"}, {"4", "a"}, {"5", "a"}},
              b = {{"1", "b"}, {"2", "b"}, {"3", "b"}, {"4", "b"}, {"5", "b"}};
  EXPECT_EQ(disagreement({a, b}),
            "1 is a on rank 0, b on rank 1; 2 is a on rank 0, b on rank 1; 3 is a on rank 0, b on "
            "rank 1; 2 more differ");
}

TEST(GroupOfOne, HoldsCallersToTheContractOfLargerOnes) {
  const Group group;
  at::Tensor transposed = at::zeros({2, 3}).t();
  EXPECT_THROW(group.all_reduce(transposed), c10::Error);
  at::Tensor small = at::zeros({3});
  EXPECT_THROW(group.all_gather(small, at::zeros({2})), c10::Error);
  EXPECT_THROW(group.broadcast(small, 1), c10::Error);
  EXPECT_THROW(group.send(small, 0), c10::Error);
}

// A member of two whose collectives fail as a broken network makes them fail.
Group failing_group(const std::string& reason) {
  struct Failing : c10d::Backend {
    explicit Failing(std::string text_) : Backend(0, 2), text(std::move(text_)) {}
    c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>&,
                                             const c10d::AllreduceOptions&) override {
      struct FailingWork : c10d::Work {
        explicit FailingWork(std::string text_) : text(std::move(text_)) {}
        bool wait(milliseconds) override { throw std::runtime_error(text); }
        std::string text;
      };
      return c10::make_intrusive<FailingWork>(text);
    }
    c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>&,
                                             const c10d::BroadcastOptions&) override {
      TORCH_CHECK(false, text);
    }
    std::string text;
  };
  auto process_group = c10::make_intrusive<c10d::ProcessGroup>(0, 2);
  process_group->setBackend(
      at::kCPU, c10d::ProcessGroup::BackendType::CUSTOM,
      c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<Failing>(reason)));
  process_group->setDefaultBackend(c10d::ProcessGroup::BackendType::CUSTOM);
  return Group("tp", process_group, milliseconds(1000), {4, 5});
}

TEST(Group, TranslatesErrorsOfAnyBackend) {
  const Group group = failing_group("cable pulled");
  at::Tensor x = at::zeros({2});
  EXPECT_THAT(error_of(ErrorKind::kCommunication, [&] { group.all_reduce(x); }),
              AllOf(HasSubstr("world rank 4"), HasSubstr("group 'tp' (rank 0 of 2)"),
                    HasSubstr("all_reduce"), HasSubstr("cable pulled")));
  EXPECT_THAT(error_of(ErrorKind::kCommunication, [&] { group.broadcast(x); }),
              AllOf(HasSubstr("world rank 4"), HasSubstr("broadcast"), HasSubstr("cable pulled")));
}

TEST(Group, SkipsEmptyTensors) {
  const Group group = failing_group("must not be called");
  at::Tensor empty = at::zeros({0, 3});
  group.all_reduce(empty);
  group.broadcast(empty);
}

TEST(Group, RefusesNonsense) {
  const auto process_group = failing_group("").process_group();
  error_of(ErrorKind::kUsage, [&] { Group("g", process_group, milliseconds(0)); });
  EXPECT_THAT(
      error_of(ErrorKind::kUsage, [&] { Group("g", process_group, milliseconds(1), {1, 2, 3}); }),
      HasSubstr("3 world ranks"));
}

TEST(Pending, WaitsOnceAndWhenDestroyed) {
  int waits = 0;
  {
    Pending pending([&] { ++waits; });
    Pending moved = std::move(pending);
    pending.wait();
    EXPECT_EQ(waits, 0);
    moved.wait();
    moved.wait();
    EXPECT_EQ(waits, 1);
    Pending other([&] { ++waits; });
    moved = std::move(other);
  }
  EXPECT_EQ(waits, 2);
  // An error while destroying must not end the program.
  {
    Pending failing([] { throw Error(ErrorKind::kCommunication, "lost"); });
  }
}

TEST(Mpi, MustBeInitialisedByTheProgram) {
  EXPECT_THAT(error_of(ErrorKind::kUsage,
                       [] { make_mpi_group("world", MPI_COMM_WORLD, milliseconds(1000)); }),
              HasSubstr("MPI_Init_thread"));
  Environment environment;
  environment.launcher = Launcher::kMpirun;
  environment.world_size = 2;
  EXPECT_THAT(error_of(ErrorKind::kUsage,
                       [&] { Mesh::create(environment, {2, 1}, at::kCPU, milliseconds(1000)); }),
              HasSubstr("MPI_Init_thread"));
}

TEST(Mesh, OfOneProcessNeedsNothing) {
  const Mesh mesh = Mesh::create({}, {1, 1}, at::kCPU, milliseconds(1000));
  EXPECT_EQ(mesh.world().size(), 1);
  EXPECT_EQ(mesh.tp().size(), 1);
  EXPECT_EQ(mesh.dp().size(), 1);
  EXPECT_THAT(
      error_of(ErrorKind::kUsage, [] { Mesh::create({}, {2, 1}, at::kCPU, milliseconds(1000)); }),
      AllOf(HasSubstr("tp=2"), HasSubstr("dp=1"), HasSubstr("world size of 1")));
}

TEST(Mesh, ChecksItsShape) {
  check_shape({2, 3}, 6);
  EXPECT_THAT(error_of(ErrorKind::kUsage, [] { check_shape({4, 1}, 6); }),
              HasSubstr("tp=4 times dp=1 is not the world size of 6"));
  error_of(ErrorKind::kUsage, [] { check_shape({0, 6}, 6); });
  error_of(ErrorKind::kUsage, [] { check_shape({-1, -6}, 6); });
  error_of(ErrorKind::kUsage, [] { check_shape({int64_t{1} << 62, 4}, 1); });
}

TEST(Mesh, RefusesCpuUnderTorchrun) {
  Environment environment;
  environment.launcher = Launcher::kTorchrun;
  environment.world_size = 2;
  EXPECT_THAT(error_of(ErrorKind::kUsage,
                       [&] { Mesh::create(environment, {2, 1}, at::kCPU, milliseconds(1000)); }),
              AllOf(HasSubstr("torchrun"), HasSubstr("mpirun")));
}

TEST(Nccl, SaysWhyItIsNotThere) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  const auto make = [&](at::Device device) {
    make_nccl_group("tp", store, {0, 1}, 0, device, milliseconds(1000));
  };
  if (!built_with_nccl()) {
    EXPECT_THAT(error_of(ErrorKind::kUsage, [&] { make(at::Device(at::kCUDA, 0)); }),
                AllOf(HasSubstr("cuda:0"), HasSubstr("built without CUDA")));
  } else {
    EXPECT_THAT(error_of(ErrorKind::kUsage, [&] { make(at::Device(at::kCPU)); }), HasSubstr("cpu"));
    // No machine has this many.
    EXPECT_THAT(error_of(ErrorKind::kUsage, [&] { make(at::Device(at::kCUDA, 127)); }),
                HasSubstr("cuda:127"));
  }
}

TEST(HashBytes, TellsContentsApart) {
  EXPECT_EQ(hash_bytes("abc"), hash_bytes("abc"));
  EXPECT_NE(hash_bytes("abc"), hash_bytes("abd"));
  EXPECT_NE(hash_bytes(""), hash_bytes(std::string_view("\0", 1)));
}

}  // namespace
}  // namespace drrl
