#include "distributed/collectives/watchdog.h"

#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "core/error.h"

namespace drrl {
namespace {

using std::chrono::duration_cast;
using std::chrono::milliseconds;

constexpr milliseconds kLongestNap{100};

std::string seconds(Watchdog::Clock::duration duration) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3f s", std::chrono::duration<double>(duration).count());
  return text;
}

}  // namespace

Watchdog::Watchdog(std::string owner, milliseconds limit,
                   std::function<void(const std::string&)> on_overdue, milliseconds grace)
    : owner_(std::move(owner)), limit_(limit), grace_(grace), on_overdue_(std::move(on_overdue)) {
  check(ErrorKind::kUsage, limit_.count() > 0 && grace_.count() >= 0, "a watchdog's limit of ",
        limit_.count(), " ms must be positive, its grace of ", grace_.count(), " ms not negative");
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), "watchdog");
}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  stopping_.notify_all();
  thread_.join();
}

Watchdog::Watched::Watched(Watched&& other) noexcept
    : watchdog_(std::exchange(other.watchdog_, nullptr)), number_(other.number_) {}

Watchdog::Watched::~Watched() {
  if (watchdog_ != nullptr) {
    watchdog_->close(number_);
  }
}

Watchdog::Watched Watchdog::section(std::string name, int64_t step) {
  const std::lock_guard lock(mutex_);
  if (step != kSameStep) {
    step_ = step;
  }
  const Operation& noted = note({.what = std::move(name)});
  open_[noted.number] = {noted, noted.begun, limit_};
  return Watched(*this, noted.number);
}

void Watchdog::alive() {
  const std::lock_guard lock(mutex_);
  last_sign_ = Clock::now();
}

uint64_t Watchdog::begin_collective(const std::string& group, const char* operation,
                                    std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  return note({.what = group, .collective = operation, .bytes = bytes}).number;
}

Watchdog::Watched Watchdog::hold(uint64_t collective, milliseconds timeout) {
  const std::lock_guard lock(mutex_);
  const Operation& noted = ring_[collective % kRemembered];
  // Overwritten while it was under way: more than a hundred were begun after it.
  Operation operation = noted.number == collective
                            ? noted
                            : Operation{.number = collective,
                                        .what = "?",
                                        .collective = "forgotten collective"};
  open_[collective] = {std::move(operation), Clock::now(), timeout + grace_};
  return Watched(*this, collective);
}

void Watchdog::complete_collective(uint64_t collective) {
  const std::lock_guard lock(mutex_);
  last_sign_ = Clock::now();
  Operation& noted = ring_[collective % kRemembered];
  if (noted.number == collective) {
    noted.ended = last_sign_;
  }
}

std::string Watchdog::recorded() const {
  const std::lock_guard lock(mutex_);
  return recorded_locked(Clock::now());
}

Watchdog::Operation& Watchdog::note(Operation operation) {
  operation.number = ++count_;
  operation.step = step_;
  operation.begun = Clock::now();
  return ring_[operation.number % kRemembered] = std::move(operation);
}

void Watchdog::close(uint64_t number) {
  const std::lock_guard lock(mutex_);
  const auto found = open_.find(number);
  const bool is_section = found->second.operation.collective == nullptr;
  open_.erase(found);
  Operation& noted = ring_[number % kRemembered];
  if (is_section && noted.number == number) {
    noted.ended = Clock::now();
  }
}

void Watchdog::run() {
  const milliseconds nap = std::clamp(limit_ / 10, milliseconds(1), kLongestNap);
  std::unique_lock lock(mutex_);
  while (!stopping_.wait_for(lock, nap, [this] { return stop_; })) {
    const std::string report = overdue(Clock::now());
    if (!report.empty()) {
      lock.unlock();
      on_overdue_(report);
      return;
    }
  }
}

// What to report; empty while all is well.
std::string Watchdog::overdue(Clock::time_point now) const {
  for (const auto& [number, open] : open_) {
    const bool is_section = open.operation.collective == nullptr;
    const Clock::time_point last = is_section ? std::max(open.since, last_sign_) : open.since;
    if (now - last <= open.limit) {
      continue;
    }
    std::string text = c10::str(owner_, ": ", describe(open.operation, now),
                                is_section ? ": no sign of life for " : ": held for ",
                                seconds(now - last), ", the limit is ", seconds(open.limit),
                                "\nopen:\n");
    for (const auto& [other, item] : open_) {
      text += "  " + describe(item.operation, now) + "\n";
    }
    return text + recorded_locked(now);
  }
  return {};
}

std::string Watchdog::recorded_locked(Clock::time_point now) const {
  std::string text = c10::str("the last ", std::min<uint64_t>(count_, kRemembered), " of ", count_,
                              " operations:\n");
  for (uint64_t number = count_ > kRemembered ? count_ - kRemembered + 1 : 1; number <= count_;
       ++number) {
    text += "  " + describe(ring_[number % kRemembered], now) + "\n";
  }
  return text;
}

std::string Watchdog::describe(const Operation& operation, Clock::time_point now) {
  std::string text = c10::str("#", operation.number, " step ", operation.step, ": ");
  if (operation.collective == nullptr) {
    text += operation.what;
  } else {
    text += c10::str("group '", operation.what, "' ", operation.collective, " of ", operation.bytes,
                     " bytes");
  }
  text += ", begun " + seconds(now - operation.begun) + " ago";
  const bool ended = operation.ended != Clock::time_point();
  return text + (ended ? ", took " + seconds(operation.ended - operation.begun) : ", not complete");
}

}  // namespace drrl
