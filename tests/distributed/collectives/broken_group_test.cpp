// Groups that break: what their members are told, and that other groups still work.
#include <chrono>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "distributed/mpi/mpi_group.h"
#include "tests/support/mpi_test.h"

namespace drrl {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;

class BrokenGroup : public MpiTest {
 protected:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

TEST_F(BrokenGroup, TimeoutNamesRankGroupOperationNumberAndAge) {
  const Group group = make_mpi_group("lonely", MPI_COMM_WORLD, milliseconds(400));
  group.barrier();
  if (rank_ == size_ - 1) {
    return;  // does not take part, and the others say so
  }
  at::Tensor x = at::ones({1000});
  at::Tensor y = at::ones({7});
  Pending first = group.all_reduce_async(x);
  Pending second = group.all_reduce_async(y, ReduceOp::kMax);
  const std::string message = error_of(ErrorKind::kCommunication, [&] { first.wait(); });
  EXPECT_THAT(message, AllOf(HasSubstr(c10::str("world rank ", rank_, ", group 'lonely' (rank ",
                                                rank_, " of ", size_)),
                             HasSubstr("all_reduce(sum) of 1000 x Float #2"),
                             HasSubstr("within 400 ms"), HasSubstr("age 4")));
  EXPECT_GE(seconds(), 0.39);
  EXPECT_LT(seconds(), 5);
  // What was queued behind it, and what comes later, fails at once and says why.
  EXPECT_THAT(
      error_of(ErrorKind::kCommunication, [&] { second.wait(); }),
      AllOf(HasSubstr("all_reduce(max) of 7 x Float #3"), HasSubstr("#2 did not complete")));
  const double before = seconds();
  EXPECT_THAT(error_of(ErrorKind::kCommunication, [&] { group.barrier(); }),
              AllOf(HasSubstr("barrier #4"), HasSubstr("is broken")));
  EXPECT_LT(seconds() - before, 0.3);
}

TEST_F(BrokenGroup, OtherGroupsStillWork) {
  const Group group = make_mpi_group("fresh", MPI_COMM_WORLD, milliseconds(20000));
  at::Tensor x = at::ones({100000});
  group.all_reduce(x);
  EXPECT_TRUE(x.equal(at::full({100000}, static_cast<float>(size_))));
}

TEST_F(BrokenGroup, AReceiveThatNobodyAnswersTimesOut) {
  const Group group = make_mpi_group("silent", MPI_COMM_WORLD, milliseconds(200));
  at::Tensor x = at::empty({3}, at::kLong);
  EXPECT_THAT(
      error_of(ErrorKind::kCommunication, [&] { group.receive(x, (rank_ + 1) % size_); }),
      AllOf(HasSubstr("group 'silent'"),
            HasSubstr(c10::str("receive of 3 x Long from rank ", (rank_ + 1) % size_, " #1"))));
}

TEST_F(BrokenGroup, AShortMessageIsNoticed) {
  const Group group = make_mpi_group("short", MPI_COMM_WORLD, milliseconds(20000));
  if (rank_ == 0) {
    group.send(at::ones({2}), 1);
  } else if (rank_ == 1) {
    at::Tensor x = at::zeros({5});
    EXPECT_THAT(error_of(ErrorKind::kCommunication, [&] { group.receive(x, 0); }),
                HasSubstr("got only 2 elements"));
  }
}

TEST_F(BrokenGroup, MpisOwnWordsAreTold) {
  const Group group = make_mpi_group("long", MPI_COMM_WORLD, milliseconds(20000));
  if (rank_ == 0) {
    group.send(at::ones({5}), 1);
  } else if (rank_ == 1) {
    at::Tensor x = at::zeros({2});
    EXPECT_THAT(error_of(ErrorKind::kCommunication, [&] { group.receive(x, 0); }),
                AllOf(HasSubstr("MPI_ERR_TRUNCATE"), HasSubstr("'long'")));
  }
}

TEST_F(BrokenGroup, TheIdleThreadBurnsNoCore) {
  const Group group = make_mpi_group("idle", MPI_COMM_WORLD, milliseconds(20000));
  group.barrier();
  // Rank 0 comes 1 s late; what the others burn while waiting is a small part of that.
  if (rank_ == 0) {
    usleep(1000000);
  }
  timespec before{};
  timespec after{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
  group.barrier();
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
  const double burnt = static_cast<double>(after.tv_sec - before.tv_sec) +
                       1e-9 * static_cast<double>(after.tv_nsec - before.tv_nsec);
  EXPECT_LT(burnt, 0.2);
}

}  // namespace
}  // namespace drrl
