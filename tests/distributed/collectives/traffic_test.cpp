// What the collectives of a group are counted as.
#include "distributed/collectives/traffic.h"

#include <chrono>
#include <numeric>
#include <thread>

#include "distributed/mpi/mpi_group.h"
#include "tests/support/mpi_test.h"

namespace drrl {
namespace {

using Traffics = MpiTest;

TEST_F(Traffics, BusFactorsAreThoseOfNcclTests) {
  // doc/PERFORMANCE.md there, worked out for two, three and eight processes.
  const std::map<std::string, std::vector<double>> expected = {
      {"all_reduce", {1, 4.0 / 3, 1.75}},
      {"all_gather", {0.5, 2.0 / 3, 0.875}},
      {"reduce_scatter", {0.5, 2.0 / 3, 0.875}},
      {"all_to_all", {0.5, 2.0 / 3, 0.875}},
      {"broadcast", {1, 1, 1}}};
  for (const auto& [operation, factors] : expected) {
    EXPECT_DOUBLE_EQ(bus_factor(operation, 2), factors[0]) << operation;
    EXPECT_DOUBLE_EQ(bus_factor(operation, 3), factors[1]) << operation;
    EXPECT_DOUBLE_EQ(bus_factor(operation, 8), factors[2]) << operation;
  }
  EXPECT_THAT(error_of(ErrorKind::kInternal, [] { bus_factor("scan", 2); }),
              testing::HasSubstr("'scan'"));
}

TEST_F(Traffics, CountsCallsAndBytesByGroupAndOperation) {
  Group group = make_mpi_group("counted", MPI_COMM_WORLD, std::chrono::milliseconds(20000));
  const auto traffic = std::make_shared<Traffic>();
  group.count(traffic);
  const int64_t n = size_;
  at::Tensor whole = at::ones({12 * n}), part = at::ones({12});  // floats
  group.all_reduce(whole);
  group.all_reduce(part);
  group.all_gather(whole, part);
  group.reduce_scatter(part, whole);
  group.broadcast(part, n - 1);
  group.gather(part, 0);
  // Member i sends i + 1 floats to everybody, itself included.
  std::vector<int64_t> receives(static_cast<size_t>(n));
  std::iota(receives.begin(), receives.end(), 1);
  at::Tensor incoming = at::empty({n * (n + 1) / 2}), outgoing = at::ones({n * (rank_ + 1)});
  group
      .all_to_all_async(incoming, receives, outgoing,
                        std::vector<int64_t>(static_cast<size_t>(n), rank_ + 1))
      .wait();
  const auto entries = traffic->take();
  if (n == 1) {
    for (const auto& [key, entry] : entries) {
      EXPECT_EQ(entry.sent_bytes, 0) << key.second;  // nobody to send to
    }
    return;
  }
  const auto sent = [&](const char* operation) {
    return entries.at({"counted", operation}).sent_bytes;
  };
  const double factor = static_cast<double>(n - 1) / static_cast<double>(n),
               message = 48.0 * static_cast<double>(n);
  EXPECT_EQ(entries.at({"counted", "all_reduce"}).calls, 2);
  EXPECT_DOUBLE_EQ(sent("all_reduce"), 2 * factor * (message + 48));
  EXPECT_DOUBLE_EQ(sent("all_gather"), factor * message);
  EXPECT_DOUBLE_EQ(sent("reduce_scatter"), factor * message);
  EXPECT_DOUBLE_EQ(sent("broadcast"), 48);
  EXPECT_DOUBLE_EQ(sent("gather"), rank_ == 0 ? 0 : 48);
  EXPECT_DOUBLE_EQ(sent("all_to_all"), static_cast<double>(4 * (n - 1) * (rank_ + 1)));
  for (const auto& [key, entry] : entries) {
    EXPECT_GT(entry.waited_ms, 0) << key.second;
  }
  EXPECT_TRUE(traffic->take().empty());
}

TEST_F(Traffics, WaitingForALateMemberIsCounted) {
  Group group = make_mpi_group("late", MPI_COMM_WORLD, std::chrono::milliseconds(20000));
  const auto traffic = std::make_shared<Traffic>();
  group.count(traffic);
  if (size_ == 1) {
    group.barrier();
    EXPECT_TRUE(traffic->take().empty());
    return;
  }
  group.barrier();
  traffic->take();
  at::Tensor x = at::ones({8});
  Pending pending;
  if (rank_ == 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1000));
    pending = group.all_reduce_async(x);
  } else {
    pending = group.all_reduce_async(x);
  }
  pending.wait();
  const double waited = traffic->take().at({"late", "all_reduce"}).waited_ms;
  if (rank_ == 0) {
    EXPECT_LT(waited, 500);
  } else {
    EXPECT_GT(waited, 500);
  }
  // What runs beside a member's own work does not hold it.
  group.barrier();
  pending = group.all_reduce_async(x);
  std::this_thread::sleep_for(std::chrono::milliseconds(1000));
  pending.wait();
  EXPECT_LT(traffic->take().at({"late", "all_reduce"}).waited_ms, 500);
}

}  // namespace
}  // namespace drrl
