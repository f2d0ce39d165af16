#include "distributed/mpi/mpi_progress.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <utility>

#include <ATen/core/ivalue.h>

#include "core/error.h"
#include "distributed/mpi/mpi_communicator.h"

namespace drrl {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::duration_cast;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr nanoseconds kEagerTime = std::chrono::microseconds(200);
constexpr double kEagerNanosecondsPerByte = 1.0;
constexpr nanoseconds kLongestNap = std::chrono::milliseconds(1);
constexpr milliseconds kStuckGrace = std::chrono::seconds(10);

int64_t now_ns() {
  return duration_cast<nanoseconds>(Clock::now().time_since_epoch()).count();
}

// Works whose requests never completed. MPI may still write into their tensors, so they live as
// long as the process.
void keep_forever(c10::intrusive_ptr<c10d::Work> work) {
  static std::mutex mutex;
  static auto* kept = new std::vector<c10::intrusive_ptr<c10d::Work>>();
  const std::lock_guard lock(mutex);
  kept->push_back(std::move(work));
}

}  // namespace

/// The handle of a submitted operation, and its state on the thread.
class MpiWork final : public c10d::Work {
 public:
  MpiWork(int rank, MpiOperation operation, uint64_t sequence, std::string owner,
          std::shared_ptr<std::atomic<int64_t>> heartbeat)
      : Work(rank, operation.type),
        operation_(std::move(operation)),
        sequence_(sequence),
        owner_(std::move(owner)),
        heartbeat_(std::move(heartbeat)),
        submitted_(Clock::now()),
        future_(c10::make_intrusive<c10::ivalue::Future>(
            c10::ListType::create(c10::TensorType::get()))) {}

  bool wait(milliseconds timeout) override {
    std::unique_lock lock(mutex_);
    const auto deadline = Clock::now() + timeout;
    while (!completed_) {
      const auto patience = timeout == kNoTimeout ? milliseconds(1000)
                                                  : std::min(timeout, milliseconds(1000));
      if (cv_.wait_for(lock, patience, [this] { return completed_; })) {
        break;
      }
      check(ErrorKind::kCommunication, timeout == kNoTimeout || Clock::now() < deadline, describe(),
            " is not complete after a wait of ", timeout.count(), " ms (age ", age().count(),
            " ms)");
      const nanoseconds silent(
          now_ns() - std::max(heartbeat_->load(),
                              duration_cast<nanoseconds>(submitted_.time_since_epoch()).count()));
      check(ErrorKind::kCommunication, silent < operation_.timeout + kStuckGrace, describe(),
            " is stuck inside MPI for ", duration_cast<milliseconds>(silent).count(), " ms");
    }
    if (exception_) {
      std::rethrow_exception(exception_);
    }
    return true;
  }

  std::vector<at::Tensor> result() override { return operation_.outputs; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }
  uint64_t getSequencenumber() const override { return sequence_; }

  std::string describe() const {
    return c10::str(owner_, ": ", operation_.description, " #", sequence_);
  }
  milliseconds age() const { return duration_cast<milliseconds>(Clock::now() - submitted_); }
  const MpiOperation& operation() const { return operation_; }
  bool is_message() const { return c10d::isP2POp(operation_.type); }

  void begin() { begun_ = Clock::now(); }
  bool overdue() const { return Clock::now() - begun_ > operation_.timeout; }
  bool has_pending_requests() const { return !requests_.pending.empty(); }

  // Goes as far as it can without blocking; true when something moved.
  bool advance() {
    bool moved = false;
    for (;;) {
      if (!requests_.pending.empty()) {
        if (!test()) {
          return moved;
        }
        requests_.pending.clear();
      }
      moved = true;
      if (next_step_ == operation_.steps.size()) {
        done_ = true;
        return true;
      }
      operation_.steps[next_step_++](requests_);
    }
  }
  bool done() const { return done_; }

  void succeed() {
    operation_.steps.clear();
    finish();
    future_->markCompleted(c10::IValue(operation_.outputs));
  }

  void fail(const std::string& message) {
    const auto error = std::make_exception_ptr(Error(ErrorKind::kCommunication, message));
    finish(error);
    future_->setError(error);
  }

 private:
  bool test() {
    auto& [pending, completed] = requests_;
    completed.resize(pending.size());
    int flag = 0;
    const int status = MPI_Testall(static_cast<int>(pending.size()), pending.data(), &flag,
                                   completed.data());
    if (status == MPI_ERR_IN_STATUS) {
      for (const MPI_Status& one : completed) {
        if (one.MPI_ERROR != MPI_ERR_PENDING) {
          check_mpi(one.MPI_ERROR, "MPI_Testall");
        }
      }
    }
    check_mpi(status, "MPI_Testall");
    return flag != 0;
  }

  MpiOperation operation_;
  const uint64_t sequence_;
  const std::string owner_;
  const std::shared_ptr<std::atomic<int64_t>> heartbeat_;
  const Clock::time_point submitted_;
  Clock::time_point begun_;
  MpiRequests requests_;
  std::size_t next_step_ = 0;
  bool done_ = false;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

MpiProgress::MpiProgress(std::string owner, const std::string& group, int rank)
    : owner_(std::move(owner)),
      rank_(rank),
      heartbeat_(std::make_shared<std::atomic<int64_t>>(now_ns())) {
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), ("mpi:" + group).substr(0, 15).c_str());
}

MpiProgress::~MpiProgress() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

c10::intrusive_ptr<c10d::Work> MpiProgress::submit(MpiOperation operation) {
  std::unique_lock lock(mutex_);
  const bool message = c10d::isP2POp(operation.type);
  const uint64_t sequence = message ? ++message_count_ : ++collective_count_;
  auto work = c10::make_intrusive<MpiWork>(rank_, std::move(operation), sequence, owner_,
                                           heartbeat_);
  if (!failure_.empty()) {
    const std::string reason = work->describe() +
                               " was not run, because the group is broken: " + failure_;
    lock.unlock();
    work->fail(reason);
    return work;
  }
  (message ? messages_ : collectives_).push_back(work);
  lock.unlock();
  changed_.notify_all();
  return work;
}

uint64_t MpiProgress::collectives() const {
  const std::lock_guard lock(mutex_);
  return collective_count_;
}

bool MpiProgress::failed() const {
  const std::lock_guard lock(mutex_);
  return !failure_.empty();
}

// Moves what may start now to `active`, sleeping while there is nothing at all; false when the
// thread should end.
bool MpiProgress::take_work(std::vector<WorkPtr>& active) {
  std::unique_lock lock(mutex_);
  if (active.empty()) {
    changed_.wait(lock, [this] { return stop_ || !collectives_.empty() || !messages_.empty(); });
  }
  const auto start = [&](std::deque<WorkPtr>& queue) {
    active.push_back(std::move(queue.front()));
    queue.pop_front();
    active.back()->begin();
  };
  while (!messages_.empty()) {
    start(messages_);
  }
  const bool collective_active = std::any_of(
      active.begin(), active.end(), [](const WorkPtr& work) { return !work->is_message(); });
  if (!collective_active && !collectives_.empty()) {
    start(collectives_);
  }
  return !active.empty();
}

void MpiProgress::run() {
  // Naps are tens of microseconds; the default timer slack of 50 us would double them.
  prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL);
  std::vector<WorkPtr> active;
  auto last_advance = Clock::now();
  while (take_work(active)) {
    heartbeat_->store(now_ns());
    bool moved = false;
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < active.size();) {
      MpiWork& work = *active[i];
      try {
        moved |= work.advance();
        check(ErrorKind::kCommunication, work.done() || !work.overdue(), "did not complete within ",
              work.operation().timeout.count(),
              " ms: another member has not taken part, or the network is down");
      } catch (const std::exception& error) {
        fail(active, work, error.what());
        return;
      }
      if (work.done()) {
        const WorkPtr finished = std::move(active[i]);
        active.erase(active.begin() + static_cast<std::ptrdiff_t>(i));
        finished->succeed();
      } else {
        bytes = std::max(bytes, work.operation().bytes);
        ++i;
      }
    }
    if (moved) {
      last_advance = Clock::now();
    } else if (!active.empty()) {
      nap(last_advance, bytes);
    }
  }
}

void MpiProgress::nap(Clock::time_point last_advance, std::size_t bytes) {
  const nanoseconds waited = Clock::now() - last_advance;
  if (waited < kEagerTime + nanoseconds(static_cast<int64_t>(kEagerNanosecondsPerByte *
                                                             static_cast<double>(bytes)))) {
    sched_yield();
    return;
  }
  std::unique_lock lock(mutex_);
  const std::size_t waiting = messages_.size();
  changed_.wait_for(lock, std::min(waited / 16, kLongestNap),
                    [&] { return messages_.size() != waiting; });
}

// Ends everything: `culprit` for `reason`, the others and all later ones because of it.
void MpiProgress::fail(std::vector<WorkPtr>& active, const MpiWork& culprit,
                       const std::string& reason) {
  const std::string failure = c10::str(culprit.describe(), " ", reason, " (age ",
                                       culprit.age().count(), " ms)");
  std::vector<WorkPtr> lost = std::move(active);
  {
    const std::lock_guard lock(mutex_);
    failure_ = failure;
    lost.insert(lost.end(), messages_.begin(), messages_.end());
    lost.insert(lost.end(), collectives_.begin(), collectives_.end());
    messages_.clear();
    collectives_.clear();
  }
  for (const WorkPtr& work : lost) {
    if (work->has_pending_requests()) {
      keep_forever(work);
    }
  }
  for (const WorkPtr& work : lost) {
    work->fail(work.get() == &culprit
                   ? failure
                   : work->describe() + " was not completed, because the group broke: " + failure);
  }
}

}  // namespace drrl
