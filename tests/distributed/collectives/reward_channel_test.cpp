// Rounds of records and weights between several processes, over MPI and over a c10d group that is
// not ours.
#include "distributed/collectives/reward_channel.h"

#include <chrono>
#include <thread>

#include "core/error.h"
#include "distributed/mpi/mpi_group.h"
#include "tests/support/mpi_test.h"
#include "tests/support/strict_nccl.h"

namespace drrl {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

class RewardChannelTest : public MpiTest {
 protected:
  void TearDown() override { MPI_Barrier(MPI_COMM_WORLD); }

  Group group() const { return make_mpi_group("policy", MPI_COMM_WORLD, std::chrono::seconds(30)); }
  /// Of a size and contents of its own for each process and round.
  at::Tensor record(int64_t rank, int64_t round) const {
    return at::full({2 + rank}, static_cast<double>(10 * round + rank), at::kDouble);
  }
  RewardChannel::Train sums() const {
    return [](const std::vector<at::Tensor>& records) {
      at::Tensor result = at::zeros({2}, at::kDouble);
      for (const at::Tensor& one : records) {
        result += at::stack(
            {one.sum(), at::full({}, static_cast<double>(one.numel()), at::kDouble)});
      }
      return result;
    };
  }
  at::Tensor expected(int64_t round, bool padded) const {
    double sum = 0, elements = 0;
    for (int64_t rank = 0; rank < size_; ++rank) {
      sum += record(rank, round).sum().item<double>();
      elements += static_cast<double>(padded ? 1 + size_ : 2 + rank);
    }
    return at::tensor({sum, elements}, at::kDouble);
  }
};

TEST_F(RewardChannelTest, BringsAllRecordsToTheTrainerAndItsWeightsToAll) {
  RewardChannel channel(group(), 2 + rank_, 2, sums());
  for (int64_t round = 0; round < 3; ++round) {
    EXPECT_FALSE(channel.under_way());
    channel.post(record(rank_, round));
    EXPECT_TRUE(channel.under_way());
    EXPECT_THROW(channel.post(record(rank_, round)), c10::Error);
    EXPECT_TRUE(channel.take().equal(expected(round, /*padded=*/false)));
  }
  EXPECT_THROW(channel.take(), c10::Error);
  EXPECT_THROW(channel.post(at::zeros({9}, at::kDouble)), c10::Error);
}

TEST_F(RewardChannelTest, ASlowTrainerHoldsNobodyUp) {
  Group steps = make_mpi_group("steps", MPI_COMM_WORLD, std::chrono::seconds(30));
  RewardChannel channel(group(), 1, 1, [](const std::vector<at::Tensor>& records) {
    std::this_thread::sleep_for(milliseconds(400));
    return records[0] + 1;
  });
  at::Tensor value = at::zeros({1}, at::kDouble);
  MPI_Barrier(MPI_COMM_WORLD);
  for (int64_t round = 0; round < 2; ++round) {
    const auto start = Clock::now();
    channel.post(value);
    for (int64_t step = 0; step < 4; ++step) {  // with a collective each, as of gradients
      std::this_thread::sleep_for(milliseconds(10));
      at::Tensor gradient = at::ones({64});
      steps.all_reduce(gradient);
    }
    EXPECT_LT(ms_since(start), 300) << "four steps of 10 ms waited for the trainer";
    EXPECT_TRUE(channel.under_way());
    std::this_thread::sleep_for(milliseconds(600));  // and some more
    const double before = channel.waited_ms();
    value = channel.take();
    EXPECT_LT(channel.waited_ms() - before, 100);
    EXPECT_EQ(value.item<double>(), static_cast<double>(round + 1));
  }
}

// A process that comes late to its post holds up the trainer's thread alone.
TEST_F(RewardChannelTest, ALateRecordHoldsUpTheTrainerAlone) {
  RewardChannel channel(group(), 1, 1,
                        [](const std::vector<at::Tensor>& records) { return records.back(); });
  MPI_Barrier(MPI_COMM_WORLD);
  if (rank_ + 1 == size_) {
    std::this_thread::sleep_for(milliseconds(300));
  }
  const auto start = Clock::now();
  channel.post(at::full({1}, static_cast<double>(rank_), at::kDouble));
  EXPECT_LT(ms_since(start), 200);
  EXPECT_EQ(channel.take().item<double>(), size_ - 1);
}

TEST_F(RewardChannelTest, ATrainerThatFailsSaysWhyOnRankZero) {
  RewardChannel channel(make_mpi_group("policy", MPI_COMM_WORLD, milliseconds(300)), 1, 1,
                        [](const std::vector<at::Tensor>&) -> at::Tensor {
                          raise(ErrorKind::kNumerics, "the trainer is at its wits' end");
                        });
  channel.post(at::zeros({1}, at::kDouble));
  const auto kind = rank_ == 0 ? ErrorKind::kNumerics : ErrorKind::kCommunication;
  EXPECT_NE(
      error_of(kind, [&] { channel.take(); }).find(rank_ == 0 ? "wits' end" : "group 'policy'"),
      std::string::npos);
}

TEST_F(RewardChannelTest, TravelsOverAnyC10dGroup) {
  const Group mpi = group();
  if (size_ == 1) {
    return;
  }
  const auto journal = std::make_shared<Journal>();  // gathers tensors of one size only, as a group
                                                     // that a host program brings may do
  RewardChannel channel(over_strict_nccl(mpi, journal), 2 + rank_, 2, sums());
  for (int64_t round = 0; round < 2; ++round) {
    channel.post(record(rank_, round));
    EXPECT_TRUE(channel.take().equal(expected(round, /*padded=*/true)));
  }
  expect_nccls_rules_kept(*journal);
}

}  // namespace
}  // namespace drrl
