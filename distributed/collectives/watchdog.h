#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace drrl {

/// Notices that this process is stuck where no error can reach it: inside a blocking call, in a
/// write to a dead file system, in MPI_Finalize, or waiting outside a collective for a process that
/// is gone. It also remembers the last operations, for whoever has to find out afterwards who was
/// doing what (a flight recorder).
///
/// Two things are watched, by one thread. A *section* (a step, an evaluation, a checkpoint) must
/// give a sign of life at least every `limit`: a collective that completed, or a call of `alive`. A
/// *collective* that holds its caller must return within its group's timeout plus kGrace; groups
/// fail it at the timeout themselves, so this is for calls that never come to that.
///
/// The library never ends the process: `on_overdue` hears what is overdue, all that is open, and
/// the last 100 operations, once, on the watchdog's thread, and decides. It must not throw.
///
/// All times are of the steady clock, which no change of the date moves. A collective costs half a
/// microsecond.
class Watchdog {
 public:
  using Clock = std::chrono::steady_clock;

  static constexpr std::chrono::milliseconds kGrace = std::chrono::seconds(20);
  static constexpr std::size_t kRemembered = 100;

  /// `owner` opens the report: "world rank 3". Errors: Error(kUsage) unless limit > 0 and grace >=
  /// 0.
  Watchdog(std::string owner, std::chrono::milliseconds limit,
           std::function<void(const std::string& report)> on_overdue,
           std::chrono::milliseconds grace = kGrace);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// Something that is watched as long as this lives. Default-constructed: nothing.
  class Watched {
   public:
    Watched() = default;
    Watched(Watched&& other) noexcept;
    Watched& operator=(Watched&&) = delete;
    ~Watched();

   private:
    friend class Watchdog;
    Watched(Watchdog& watchdog, uint64_t number) : watchdog_(&watchdog), number_(number) {}

    Watchdog* watchdog_ = nullptr;
    uint64_t number_ = 0;
  };

  /// Opens a section. With a `step`, all operations from now on are noted as of that step.
  [[nodiscard]] Watched section(std::string name, int64_t step = kSameStep);

  /// A sign of life.
  void alive();

  /// For Group: notes a collective (the number is for the two calls below), watches it while a
  /// caller is inside, and notes its completion, which is a sign of life.
  uint64_t begin_collective(const std::string& group, const char* operation, std::size_t bytes);
  [[nodiscard]] Watched hold(uint64_t collective, std::chrono::milliseconds timeout);
  void complete_collective(uint64_t collective);

  /// The last operations, a line each, oldest first: number, step, what, how long ago it began, how
  /// long it took.
  std::string recorded() const;

 private:
  static constexpr int64_t kSameStep = -1;

  struct Operation {
    uint64_t number = 0;  // from 1 on; 0: this place is still empty
    int64_t step = 0;
    std::string what;  // a section, or a collective's group
    const char* collective = nullptr;
    std::size_t bytes = 0;
    Clock::time_point begun{}, ended{};  // ended: zero while it is open
  };
  struct Open {
    Operation operation;
    Clock::time_point since;
    std::chrono::milliseconds limit;
  };

  Operation& note(Operation operation);  // with the lock held
  void close(uint64_t number);
  void run();
  std::string overdue(Clock::time_point now) const;
  std::string recorded_locked(Clock::time_point now) const;
  static std::string describe(const Operation& operation, Clock::time_point now);

  const std::string owner_;
  const std::chrono::milliseconds limit_, grace_;
  const std::function<void(const std::string&)> on_overdue_;

  mutable std::mutex mutex_;
  std::condition_variable stopping_;
  bool stop_ = false;
  int64_t step_ = 0;
  uint64_t count_ = 0;
  Clock::time_point last_sign_ = Clock::now();
  std::array<Operation, kRemembered> ring_;
  std::map<uint64_t, Open> open_;
  std::thread thread_;
};

/// A section of `watchdog`, which may be null.
[[nodiscard]] inline Watchdog::Watched watch(const std::shared_ptr<Watchdog>& watchdog,
                                             std::string name) {
  return watchdog ? watchdog->section(std::move(name)) : Watchdog::Watched();
}
[[nodiscard]] inline Watchdog::Watched watch_step(const std::shared_ptr<Watchdog>& watchdog,
                                                  int64_t step) {
  return watchdog ? watchdog->section("step", step) : Watchdog::Watched();
}

}  // namespace drrl
