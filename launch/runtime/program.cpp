#include "launch/runtime/program.h"

#include <malloc.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <mutex>
#include <thread>

#include <ATen/Parallel.h>

#include "core/io/file_io.h"
#include "core/io/file_watch.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/runtime/agreement.h"
#include "launch/runtime/log.h"

#ifdef DRRL_WITH_MPI
#include <mpi.h>

#include "distributed/mpi/mpi_communicator.h"
#endif

namespace drrl {
namespace {

bool stops_by_signal = false;
std::atomic<bool> stop_asked{false};
std::atomic<int> last_exit_code{0};
std::mutex last_file_mutex;
std::string last_file;  // that was opened, read or written, or is being

constexpr int64_t kSameRequestNs = 2'000'000'000;
std::atomic<int> insisted{0};           // SIGTERM and SIGINT, those apart
std::atomic<int64_t> insisted_last{0};  // when [ns]

std::atomic<bool> speaks{false};  // world rank 0

void on_stop_signal(int signal) {
  if (!stop_asked.exchange(true) && speaks) {
    constexpr std::string_view kHeard =
        "drrl: a signal was heard: this ends after the step under way, and saves if there is an "
        "--output\n";
    [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, kHeard.data(), kHeard.size());
  }
  if (signal != SIGTERM && signal != SIGINT) {
    return;
  }
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  const int64_t now = int64_t{1'000'000'000} * time.tv_sec + time.tv_nsec;
  if (insisted > 0 && now - insisted_last < kSameRequestNs) {
    return;
  }
  insisted_last = now;
  if (++insisted > 2) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
}

void on_file(const std::filesystem::path& file) {
  {
    const std::lock_guard lock(last_file_mutex);
    last_file = file.native();
  }
  sign_of_life();
}

/// Keeps big tensors on the heap: by default glibc maps and unmaps each one, and the kernel clears
/// every page anew.
void keep_big_blocks() {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);  // the largest glibc takes is about 2 GiB
  mallopt(M_TRIM_THRESHOLD, 2147483647);
  mallopt(M_TOP_PAD, 64 << 20);
}

int64_t usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return CPU_COUNT(&set);
  }
  return std::max(1U, std::thread::hardware_concurrency());
}

void set_threads(const Environment& environment) {
  constexpr int64_t kMostThreads = 65536;
  check(ErrorKind::kUsage, FLAGS_threads >= 0 && FLAGS_threads <= kMostThreads,
        "--threads must lie in [0, ", kMostThreads, "], got ", FLAGS_threads);
  if (FLAGS_threads == 0 && std::getenv("OMP_NUM_THREADS") != nullptr) {
    return;  // the user, or torchrun, has decided
  }
  const int64_t cores = usable_cores();
  // mpirun may have bound each process to its own cores already; then they need not be shared out
  // again.
  const bool bound = cores < static_cast<int64_t>(std::thread::hardware_concurrency());
  const int64_t share = bound ? cores : std::max<int64_t>(1, cores / environment.local_size);
  at::set_num_threads(static_cast<int>(FLAGS_threads > 0 ? FLAGS_threads : share));
}

bool needs_mpi(const Environment& environment) {
  return environment.launcher == Launcher::kMpirun ||
         (environment.launcher == Launcher::kSrun && environment.world_size > 1);
}

#ifdef DRRL_WITH_MPI
void start_mpi(int* argc, char*** argv) {
  int provided = 0;
  MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided);
  check(ErrorKind::kCommunication, provided == MPI_THREAD_MULTIPLE, "this MPI gives thread level ",
        provided, ", but drrl needs MPI_THREAD_MULTIPLE (", MPI_THREAD_MULTIPLE, ")");
}

void end_mpi() {
  if (mpi_is_active()) {
    MPI_Finalize();
  }
}

void abort_mpi(ExitCode code) {
  if (mpi_is_active()) {
    MPI_Abort(MPI_COMM_WORLD, static_cast<int>(code));
  }
}
#else
// Who needs MPI and does not have it is told so by Mesh::create, which every program of several
// processes calls.
void start_mpi(int* /*argc*/, char*** /*argv*/) {}
void end_mpi() {}
void abort_mpi(ExitCode /*code*/) {}
#endif

/// Ends this process with `code` after a while, whatever hangs meanwhile: MPI_Abort, or a message
/// to a reader who has stopped.
void end_within(unsigned seconds, ExitCode code) {
  last_exit_code = static_cast<int>(code);
  std::signal(SIGALRM, [](int) { _exit(last_exit_code); });
  alarm(seconds);
}

void on_hung(const std::string& report) {
  end_within(5, ExitCode::kHung);
  std::string text = "watchdog: " + report;
  {
    const std::lock_guard lock(last_file_mutex);
    text += last_file.empty() ? "" : "the last file: " + drrl::quoted(last_file) + "\n";
  }
  // Not through stdio or glog, whose locks may be what hangs.
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
  std::_Exit(static_cast<int>(ExitCode::kHung));
}

void start_watchdog(const Environment& environment) {
  check(ErrorKind::kUsage, FLAGS_timeout_s >= 1, "--timeout_s must be at least 1, got ",
        FLAGS_timeout_s);
  check(ErrorKind::kUsage, FLAGS_watchdog_timeout_s >= -1,
        "--watchdog_timeout_s must be -1 or more, got ", FLAGS_watchdog_timeout_s);
  const int64_t limit = FLAGS_watchdog_timeout_s >= 0 ? FLAGS_watchdog_timeout_s
                                                      : 3 * FLAGS_timeout_s;
  if (limit > 0) {
    watch_files(&on_file);
    set_watchdog(std::make_shared<Watchdog>(c10::str("world rank ", environment.world_rank),
                                            std::chrono::seconds(limit), &on_hung));
  }
}

[[noreturn]] void fail(const Environment& environment, ExitCode code, const std::string& message) {
  std::cout.flush();
  if (environment.world_rank != 0) {
    std::signal(SIGTERM, SIG_DFL);  // the end of the job is no crash, of which glog would tell
    std::this_thread::sleep_for(
        std::chrono::milliseconds(1000 + 50 * std::min<int64_t>(environment.world_rank, 40)));
  }
  end_within(60, code);
  log_error(environment.world_size > 1
                ? "rank " + std::to_string(environment.world_rank) + ": " + message
                : message);
  if (code == ExitCode::kCommunication && watchdog()) {
    std::cerr << watchdog()->recorded() << std::flush;
  }
  abort_mpi(code);
  // No destructors: groups whose other members are gone would wait for them.
  std::_Exit(static_cast<int>(code));
}

}  // namespace

Mesh create_mesh(const Environment& environment, MeshShape shape, at::Device device) {
  const char* tasks = std::getenv("SLURM_NTASKS");
  if (environment.launcher == Launcher::kSingle && tasks != nullptr && std::string(tasks) != "1") {
    log_warning(c10::str("this process works alone, though SLURM_NTASKS=", tasks,
                         ": to start that many, use srun --mpi=pmix or mpirun"));
  }
  const auto watched = watch(watchdog(), "making groups");
  Mesh mesh = Mesh::create(environment, shape, device, std::chrono::seconds(FLAGS_timeout_s));
  mesh.watch(watchdog());
  return mesh;
}

bool stdout_is_terminal(const Environment& environment) {
  if (isatty(STDOUT_FILENO) == 0) {
    return false;
  }
  if (environment.launcher != Launcher::kMpirun) {
    return true;
  }
  std::error_code unreadable;
  const auto target = std::filesystem::read_symlink("/proc/" + std::to_string(getppid()) + "/fd/1",
                                                    unreadable)
                          .string();
  return target.starts_with("/dev/pts/") || target.starts_with("/dev/tty");
}

void watch_stop_signals() noexcept {
  stops_by_signal = true;
  sigset_t watched;
  sigemptyset(&watched);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1}) {
    struct sigaction action{};
    if (signal == SIGHUP && sigaction(signal, nullptr, &action) == 0 &&
        action.sa_handler == SIG_IGN) {
      continue;
    }
    action = {};
    action.sa_handler = on_stop_signal;
    action.sa_flags = SA_RESTART;
    sigaction(signal, &action, nullptr);
    sigaddset(&watched, signal);
  }
  pthread_sigmask(SIG_UNBLOCK, &watched, nullptr);
}

bool stop_requested() noexcept {
  return stop_asked;
}

int run_program(int argc, char** argv, const std::string& command, const std::string& summary,
                const std::function<ExitCode(const Environment&)>& body) {
  keep_big_blocks();
  Environment environment;
  ExitCode code = ExitCode::kUnexpected;
  guarded(environment, [&] {
    environment = Environment::detect();
    speaks = environment.world_rank == 0;
    std::signal(
        SIGXFSZ,
        SIG_IGN);  // a write beyond the file size limit is an error like a full disk, not a death
    std::signal(SIGPIPE, SIG_IGN);  // nor is a reader of the output that has gone: what it would
                                    // have read is dropped
    parse_options(argc, argv, command, summary);
    start_logging(argv[0]);
    if (stops_by_signal) {
      watch_stop_signals();  // glog has taken SIGTERM
    } else {
      std::signal(
          SIGTERM,
          SIG_DFL);  // a program that is told to end has not crashed, of which glog would tell
    }
    set_threads(environment);
    start_watchdog(environment);
    if (needs_mpi(environment)) {
      const auto watched = watch(watchdog(), "MPI_Init");
      start_mpi(&argc, &argv);
    }
    agree_on_options(environment, command);
    code = body(environment);
    std::cout.flush();
    const auto watched = watch(watchdog(), "MPI_Finalize");
    end_agreements();
    end_mpi();
  });
  return static_cast<int>(code);
}

void guarded(const Environment& environment, const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    fail(environment, exit_code(error.kind()),
         std::string(name(error.kind())) + " error: " + error.what());
  } catch (const c10::Error& error) {
    fail(environment, ExitCode::kUnexpected, error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    fail(environment, ExitCode::kUnexpected, "out of memory");
  } catch (const std::exception& error) {
    fail(environment, ExitCode::kUnexpected, error.what());
  }
}

}  // namespace drrl
