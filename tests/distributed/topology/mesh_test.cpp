#include "distributed/topology/mesh.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <torch/csrc/distributed/c10d/Store.hpp>

#include "distributed/mpi/mpi_group.h"
#include "distributed/topology/rendezvous.h"
#include "tests/support/mpi_test.h"

namespace drrl {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;

constexpr milliseconds kTimeout(20000);

class MeshTest : public MpiTest {
 protected:
  std::vector<MeshShape> shapes() const {
    std::vector<MeshShape> result;
    for (int64_t tp = 1; tp <= size_; ++tp) {
      if (size_ % tp == 0) {
        result.push_back({tp, size_ / tp});
      }
    }
    return result;
  }
};

int64_t sum_over(const Group& group, int64_t value) {
  at::Tensor x = at::full({1}, value, at::kLong);
  group.all_reduce(x);
  return x.item<int64_t>();
}

TEST_F(MeshTest, TheEnvironmentIsMpis) {
  const Environment environment = Environment::detect();
  EXPECT_EQ(environment.launcher, Launcher::kMpirun);
  EXPECT_EQ(environment.world_rank, rank_);
  EXPECT_EQ(environment.world_size, size_);
  EXPECT_EQ(environment.local_size, size_);
}

TEST_F(MeshTest, TensorParallelRanksAreNeighbours) {
  for (const MeshShape shape : shapes()) {
    const Mesh mesh = Mesh::create(Environment::detect(), shape, at::kCPU, kTimeout);
    EXPECT_EQ(mesh.world().size(), size_);
    EXPECT_EQ(mesh.world().rank(), rank_);
    EXPECT_EQ(mesh.tp().size(), shape.tp);
    EXPECT_EQ(mesh.tp().rank(), rank_ % shape.tp);
    EXPECT_EQ(mesh.dp().size(), shape.dp);
    EXPECT_EQ(mesh.dp().rank(), rank_ / shape.tp);
    int64_t tp_sum = 0;
    for (int64_t i = 0; i < shape.tp; ++i) {
      tp_sum += rank_ - rank_ % shape.tp + i;
    }
    int64_t dp_sum = 0;
    for (int64_t i = 0; i < shape.dp; ++i) {
      dp_sum += rank_ % shape.tp + i * shape.tp;
    }
    EXPECT_EQ(sum_over(mesh.tp(), rank_), tp_sum) << "tp=" << shape.tp << " dp=" << shape.dp;
    EXPECT_EQ(sum_over(mesh.dp(), rank_), dp_sum) << "tp=" << shape.tp << " dp=" << shape.dp;
    EXPECT_EQ(sum_over(mesh.world(), rank_), size_ * (size_ - 1) / 2);
    EXPECT_THAT(mesh.dp().describe(),
                HasSubstr(size_ > 1 ? c10::str("world rank ", rank_, ", ") : "rank 0 of 1"));
  }
}

TEST_F(MeshTest, ContextParallelRanksComeBetween) {
  for (int64_t tp = 1; tp <= size_; ++tp) {
    for (int64_t cp = 2; size_ % tp == 0 && cp <= size_ / tp; ++cp) {
      if (size_ / tp % cp != 0) {
        continue;
      }
      const MeshShape shape{tp, size_ / tp / cp, cp};
      SCOPED_TRACE(c10::str("tp=", tp, " dp=", shape.dp, " cp=", cp));
      const Mesh mesh = Mesh::create(Environment::detect(), shape, at::kCPU, kTimeout);
      EXPECT_EQ(mesh.tp().rank(), rank_ % tp);
      EXPECT_EQ(mesh.cp().rank(), rank_ / tp % cp);
      EXPECT_EQ(mesh.dp().rank(), rank_ / tp / cp);
      EXPECT_EQ(mesh.data().rank(), rank_ / tp);
      int64_t cp_sum = 0, data_sum = 0;
      for (int64_t other = 0; other < size_; ++other) {
        cp_sum += other % tp == rank_ % tp && other / (tp * cp) == rank_ / (tp * cp) ? other : 0;
        data_sum += other % tp == rank_ % tp ? other : 0;
      }
      EXPECT_EQ(sum_over(mesh.cp(), rank_), cp_sum);
      EXPECT_EQ(sum_over(mesh.data(), rank_), data_sum);
      EXPECT_THAT(
          error_of(ErrorKind::kUsage, [&] { Mesh(shape, mesh.world(), mesh.tp(), mesh.dp()); }),
          HasSubstr("context-parallel"));
    }
  }
}

// Who holds which KV head, by tensor-parallel rank.
TEST(KvHeads, AreSharedByNeighboursIfThereAreFewerThanRanks) {
  const auto heads = [](int64_t kv_heads, int64_t tp) {
    std::vector<std::vector<int64_t>> result;
    for (int64_t rank = 0; rank < tp; ++rank) {
      const IndexRange held = kv_heads_of(kv_heads, tp, rank),
                       sharers = kv_sharers_of(kv_heads, tp, rank);
      result.push_back({held.begin, held.count, sharers.begin, sharers.count});
    }
    return result;
  };
  using Rows = std::vector<std::vector<int64_t>>;
  EXPECT_EQ(heads(3, 2), (Rows{{0, 2, 0, 1}, {2, 1, 1, 1}}));
  EXPECT_EQ(heads(3, 3), (Rows{{0, 1, 0, 1}, {1, 1, 1, 1}, {2, 1, 2, 1}}));
  EXPECT_EQ(heads(3, 4), (Rows{{0, 1, 0, 2}, {0, 1, 0, 2}, {1, 1, 2, 1}, {2, 1, 3, 1}}));
  EXPECT_EQ(heads(2, 5),
            (Rows{{0, 1, 0, 3}, {0, 1, 0, 3}, {0, 1, 0, 3}, {1, 1, 3, 2}, {1, 1, 3, 2}}));
}

TEST_F(MeshTest, ProcessesThatShareAKvHeadHaveAGroup) {
  for (MeshShape shape : shapes()) {
    for (shape.kv_heads = 1; shape.kv_heads <= shape.tp; ++shape.kv_heads) {
      SCOPED_TRACE(c10::str("tp=", shape.tp, " dp=", shape.dp, " KV heads=", shape.kv_heads));
      const Mesh mesh = Mesh::create(Environment::detect(), shape, at::kCPU, kTimeout);
      int64_t sum = 0, size = 0;
      for (int64_t other = 0; other < size_; ++other) {
        if (other / shape.tp == rank_ / shape.tp &&
            kv_heads_of(shape.kv_heads, shape.tp, other % shape.tp).begin ==
                kv_heads_of(shape.kv_heads, shape.tp, rank_ % shape.tp).begin) {
          sum += other;
          ++size;
        }
      }
      EXPECT_EQ(mesh.kv().size(), size);
      EXPECT_EQ(mesh.kv().size() > 1 ? sum_over(mesh.kv(), rank_) : rank_, sum);
      if (shape.kv_heads == 1 && shape.tp > 1) {
        EXPECT_THAT(
            error_of(ErrorKind::kUsage, [&] { Mesh(shape, mesh.world(), mesh.tp(), mesh.dp()); }),
            HasSubstr("KV group"));
      }
    }
  }
}

TEST_F(MeshTest, TakesGroupsOfAHostProgram) {
  for (const MeshShape shape : shapes()) {
    const Group world = make_mpi_group("host_world", MPI_COMM_WORLD, kTimeout);
    const Group tp = make_mpi_group("host_tp", MPI_COMM_WORLD, kTimeout, rank_ / shape.tp);
    const Group dp = make_mpi_group("host_dp", MPI_COMM_WORLD, kTimeout, rank_ % shape.tp);
    const Mesh mesh(shape, world, tp, dp);
    EXPECT_EQ(mesh.tp().name(), "host_tp");
    EXPECT_EQ(mesh.shape().dp, shape.dp);
    if (shape.tp != shape.dp) {
      EXPECT_THAT(error_of(ErrorKind::kUsage, [&] { Mesh(shape, world, dp, tp); }),
                  HasSubstr("tensor-parallel"));
    }
  }
}

TEST_F(MeshTest, RefusesAShapeThatIsNotTheWorld) {
  EXPECT_THAT(
      error_of(ErrorKind::kUsage,
               [&] { Mesh::create(Environment::detect(), {size_ + 1, 1}, at::kCPU, kTimeout); }),
      HasSubstr(c10::str("tp=", size_ + 1, " times dp=1 is not the world size of ", size_)));
}

TEST_F(MeshTest, NamesContextParallelismInARefusedShape) {
  EXPECT_THAT(
      error_of(ErrorKind::kUsage, [&] { check_shape({1, size_, 2}, size_); }),
      HasSubstr(c10::str("tp=1 times dp=", size_, " times cp=2 is not the world size of ", size_)));
}

TEST_F(MeshTest, NoticesThatRanksWereGivenDifferentShapes) {
  if (size_ == 1) {
    return;
  }
  const MeshShape shape = rank_ == size_ - 1 ? MeshShape{size_, 1} : MeshShape{1, size_};
  EXPECT_THAT(
      error_of(ErrorKind::kCommunication,
               [&] { Mesh::create(Environment::detect(), shape, at::kCPU, kTimeout); }),
      AllOf(HasSubstr("do not agree on the mesh"), HasSubstr(c10::str("world rank ", size_ - 1))));
}

TEST_F(MeshTest, NoticesAnEnvironmentThatIsNotMpis) {
  Environment environment = Environment::detect();
  environment.world_size += 1;
  EXPECT_THAT(error_of(ErrorKind::kUsage,
                       [&] { Mesh::create(environment, {size_ + 1, 1}, at::kCPU, kTimeout); }),
              AllOf(HasSubstr("MPI says"), HasSubstr("mpirun says")));
}

// Every rank leaves a value and reads everybody's.
void check_store(c10d::Store& store, int rank, int size, const std::string& prefix) {
  store.set(c10::str(prefix, rank), c10::str("value ", rank));
  for (int other = 0; other < size; ++other) {
    EXPECT_EQ(store.get_to_str(c10::str(prefix, other)), c10::str("value ", other));
  }
}

TEST_F(MeshTest, MakesAStoreOverMpi) {
  const Group world = make_mpi_group("world", MPI_COMM_WORLD, kTimeout);
  const auto store = make_store(Environment::detect(), world, kTimeout);
  check_store(*store, rank_, size_, "a");
  world.barrier();  // rank 0 serves it
}

TEST_F(MeshTest, JoinsTheStoreOfTorchrun) {
  const Group world = make_mpi_group("world", MPI_COMM_WORLD, kTimeout);
  at::Tensor port = at::zeros({1}, at::kLong);
  if (rank_ == 0) {
    const int listener = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    socklen_t length = sizeof(address);
    ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), length), 0);
    ASSERT_EQ(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length), 0);
    port.fill_(static_cast<int64_t>(ntohs(address.sin_port)));
    close(listener);
  }
  world.broadcast(port);
  Environment environment = Environment::detect();
  environment.launcher = Launcher::kTorchrun;
  environment.master_address = "127.0.0.1";
  environment.master_port = port.item<int64_t>();

  // Without an agent's store, rank 0 serves; then that one plays the agent, of whom all are
  // clients.
  const auto store = make_store(environment, {}, kTimeout);
  check_store(*store, rank_, size_, "b");
  environment.agent_store = true;
  environment.restart_count = 1;
  const auto restarted = make_store(environment, {}, kTimeout);
  EXPECT_FALSE(restarted->check({"b0"})) << "the key of an earlier attempt is seen";
  world.barrier();
  check_store(*restarted, rank_, size_, "b");
  world.barrier();
}

TEST_F(MeshTest, ExchangesThroughAStoreWithoutGroups) {
  const Group world = make_mpi_group("world", MPI_COMM_WORLD, kTimeout);
  Environment environment = Environment::detect();
  const auto store = make_store(environment, world, kTimeout);
  const TextExchange exchange = exchange_over(store, "a", environment);
  for (const std::string& text :
       {std::string("first"), std::string(), std::string("\xff\0third", 7)}) {
    const std::vector<std::string> all = exchange(text + std::to_string(rank_));
    ASSERT_EQ(all.size(), static_cast<size_t>(size_));
    for (int other = 0; other < size_; ++other) {
      EXPECT_EQ(all[static_cast<size_t>(other)], text + std::to_string(other));
    }
  }
  check_agreement(exchange, {{"--lr", "0.1"}}, ErrorKind::kUsage, "options");
  if (size_ > 1) {
    EXPECT_THAT(error_of(ErrorKind::kUsage,
                         [&] {
                           check_agreement(exchange, {{"--lr", rank_ == 1 ? "0.2" : "0.1"}},
                                           ErrorKind::kUsage, "options");
                         }),
                HasSubstr("0.2 on rank 1"));
    // The last one was told otherwise, and hears of it at once; the others would wait for it.
    if (rank_ != size_ - 1) {
      exchange_over(store, "b", environment);
    }
    world.barrier();
    if (rank_ == size_ - 1) {
      Environment wrong = environment;
      wrong.world_size += 1;
      EXPECT_THAT(error_of(ErrorKind::kUsage, [&] { exchange_over(store, "b", wrong); }),
                  HasSubstr(c10::str("WORLD_SIZE=", size_ + 1, " of the process with RANK=", rank_,
                                     ", but ", size_)));
      wrong = environment;
      wrong.world_rank = 0;
      EXPECT_THAT(error_of(ErrorKind::kUsage, [&] { exchange_over(store, "b", wrong); }),
                  HasSubstr("two processes have RANK=0"));
    }
  }
  world.barrier();  // rank 0 serves it
}

TEST_F(MeshTest, SaysWhichStoreItCannotReach) {
  Environment environment = Environment::detect();
  environment.launcher = Launcher::kTorchrun;
  environment.master_address = "127.0.0.1";
  environment.master_port = 1;  // nobody listens there
  environment.agent_store = true;
  EXPECT_THAT(
      error_of(ErrorKind::kCommunication, [&] { make_store(environment, {}, milliseconds(300)); }),
      AllOf(HasSubstr("127.0.0.1:1"), HasSubstr(c10::str("world rank ", rank_))));
}

}  // namespace
}  // namespace drrl
