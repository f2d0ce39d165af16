// The watchdog without MPI: what it notices, and what it must not.
#include "distributed/collectives/watchdog.h"

#include <future>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/error_of.h"

namespace drrl {
namespace {

using namespace std::chrono_literals;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class WatchdogTest : public testing::Test {
 protected:
  std::unique_ptr<Watchdog> make(std::chrono::milliseconds limit,
                                 std::chrono::milliseconds grace = 0ms) {
    return std::make_unique<Watchdog>(
        "world rank 3", limit, [this](const std::string& report) { heard_.set_value(report); },
        grace);
  }

  /// What it said within 10 s; empty: nothing.
  std::string heard(std::chrono::milliseconds patience = 10s) {
    return report_.wait_for(patience) == std::future_status::ready ? report_.get() : "";
  }

  std::promise<std::string> heard_;
  std::future<std::string> report_ = heard_.get_future();
};

TEST_F(WatchdogTest, ASectionWithoutASignOfLife) {
  const auto start = Watchdog::Clock::now();
  const auto watchdog = make(200ms);
  const auto step = watchdog->section("step", 12);
  const auto checkpoint = watchdog->section("checkpoint");
  EXPECT_THAT(heard(), AllOf(HasSubstr("world rank 3: #1 step 12: step, begun "),
                             HasSubstr("no sign of life for "), HasSubstr("the limit is 0.200 s"),
                             HasSubstr("#2 step 12: checkpoint"), HasSubstr("not complete")));
  EXPECT_GE(Watchdog::Clock::now() - start, 200ms);
  EXPECT_LT(Watchdog::Clock::now() - start, 5s);
}

TEST_F(WatchdogTest, ACollectiveThatHoldsItsCaller) {
  const auto watchdog = make(10min, 100ms);
  const uint64_t done = watchdog->begin_collective("dp", "all_gather", 7);
  {
    const auto held = watchdog->hold(done, 10min);
  }
  watchdog->complete_collective(done);
  const auto step = watchdog->section("step", 4);
  const uint64_t number = watchdog->begin_collective("tp", "all_reduce", 4096);
  const auto held = watchdog->hold(number, 150ms);
  EXPECT_THAT(
      heard(),
      AllOf(HasSubstr("#3 step 4: group 'tp' all_reduce of 4096 bytes"), HasSubstr("held for "),
            HasSubstr("#1 step 0: group 'dp' all_gather of 7 bytes"), HasSubstr(", took 0.0")));
}

TEST_F(WatchdogTest, SignsOfLifeAndClosedSectionsKeepItQuiet) {
  const auto watchdog = make(400ms);
  {
    const auto finished = watchdog->section("evaluation");
  }
  const auto step = watchdog->section("step", 1);
  for (int i = 0; i < 12; ++i) {  // longer than the limit, all in all
    EXPECT_EQ(heard(60ms), "");
    if (i % 2 == 0) {
      watchdog->alive();
    } else {
      watchdog->complete_collective(watchdog->begin_collective("tp", "barrier", 0));
    }
  }
}

TEST_F(WatchdogTest, ACollectiveUnderWayThatHoldsNobodyIsNotItsBusiness) {
  const auto watchdog = make(50ms);
  watchdog->begin_collective("dp", "all_reduce", 4);
  EXPECT_EQ(heard(300ms), "");
}

TEST_F(WatchdogTest, RemembersTheLastHundredOperations) {
  const auto watchdog = make(10min);
  const uint64_t first = watchdog->begin_collective("dp", "broadcast", 1);
  EXPECT_THAT(watchdog->recorded(),
              HasSubstr("the last 1 of 1 operations:\n  #1 step 0: group 'dp' broadcast"));
  for (int i = 0; i < 149; ++i) {
    watchdog->complete_collective(watchdog->begin_collective("tp", "all_reduce", 4));
  }
  watchdog->complete_collective(
      first);  // forgotten meanwhile, and its place taken: nothing happens
  const std::string text = watchdog->recorded();
  EXPECT_THAT(
      text, AllOf(HasSubstr("the last 100 of 150 operations:"), HasSubstr("#51 step"),
                  HasSubstr("#150 step"), Not(HasSubstr("#50 step")), Not(HasSubstr("broadcast"))));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 101);
}

TEST_F(WatchdogTest, RefusesALimitThatIsNone) {
  EXPECT_THAT(error_of(ErrorKind::kUsage, [&] { make(0ms); }), HasSubstr("limit of 0 ms"));
}

}  // namespace
}  // namespace drrl
