#include "launch/program.h"

#include "launch/flags.h"
#include "launch/log.h"
#include "launch/options.h"

#include <ATen/Parallel.h>
#include <torch/version.h>

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
#include <thread>

#ifdef DRRL_WITH_MPI
#include "distributed/mpi_communicator.h"

#include <mpi.h>
#endif

namespace drrl {
namespace {

std::atomic<int> stop_signals{0};

void on_stop_signal(int signal) {
  if (stop_signals.fetch_add(1) >= 2) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
}

/// Keeps big tensors on the heap: by default glibc maps and unmaps each one, and the kernel clears every page anew.
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
  check(ErrorKind::kUsage, FLAGS_threads >= 0, "--threads must not be negative, got ", FLAGS_threads);
  if (FLAGS_threads == 0 && std::getenv("OMP_NUM_THREADS") != nullptr) {
    return;  // the user, or torchrun, has decided
  }
  const int64_t cores = usable_cores();
  // mpirun may have bound each process to its own cores already; then they need not be shared out again.
  const bool bound = cores < static_cast<int64_t>(std::thread::hardware_concurrency());
  const int64_t share = bound ? cores : std::max<int64_t>(1, cores / environment.local_size);
  at::set_num_threads(static_cast<int>(FLAGS_threads > 0 ? FLAGS_threads : share));
}

bool needs_mpi(const Environment& environment) {
  return environment.launcher == Launcher::kMpirun || (environment.launcher == Launcher::kSrun && environment.world_size > 1);
}

#ifdef DRRL_WITH_MPI
void start_mpi(int* argc, char*** argv) {
  int provided = 0;
  MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided);
  check(ErrorKind::kCommunication, provided == MPI_THREAD_MULTIPLE, "this MPI gives thread level ", provided,
        ", but drrl needs MPI_THREAD_MULTIPLE (", MPI_THREAD_MULTIPLE, ")");
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

std::string mpi_version() {
  char library[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  MPI_Get_library_version(library, &length);
  const std::string mpi(library, static_cast<size_t>(length));
  return mpi.substr(0, mpi.find(','));
}
#else
// Who needs MPI and does not have it is told so by Mesh::create, which every program of several processes calls.
void start_mpi(int* /*argc*/, char*** /*argv*/) {}
void end_mpi() {}
void abort_mpi(ExitCode /*code*/) {}
std::string mpi_version() { return "no MPI"; }
#endif

[[noreturn]] void fail(const Environment& environment, ExitCode code, const std::string& message) {
  std::cout.flush();
  if (environment.world_rank != 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1000 + 50 * std::min<int64_t>(environment.world_rank, 40)));
  }
  log_error(environment.world_size > 1 ? "rank " + std::to_string(environment.world_rank) + ": " + message : message);
  abort_mpi(code);
  // No destructors: groups whose other members are gone would wait for them.
  std::_Exit(static_cast<int>(code));
}

}  // namespace

std::string version_line() {
  return std::string("drrl ") + DRRL_VERSION + ", LibTorch " + TORCH_VERSION + ", " + mpi_version();
}

bool stdout_is_terminal(const Environment& environment) {
  if (isatty(STDOUT_FILENO) == 0) {
    return false;
  }
  if (environment.launcher != Launcher::kMpirun) {
    return true;
  }
  std::error_code unreadable;
  const auto target = std::filesystem::read_symlink("/proc/" + std::to_string(getppid()) + "/fd/1", unreadable).string();
  return target.starts_with("/dev/pts/") || target.starts_with("/dev/tty");
}

void watch_stop_signals() noexcept {
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) {
    struct sigaction action {};
    action.sa_handler = on_stop_signal;
    action.sa_flags = SA_RESTART;
    sigaction(signal, &action, nullptr);
  }
}

bool stop_requested() noexcept {
  return stop_signals.load() > 0;
}

int run_program(int argc, char** argv, const std::string& summary, const std::function<ExitCode(const Environment&)>& body) {
  keep_big_blocks();
  Environment environment;
  ExitCode code = ExitCode::kUnexpected;
  guarded(environment, [&] {
    environment = Environment::detect();
    parse_options(argc, argv, summary);
    start_logging(argv[0]);
    std::signal(SIGXFSZ, SIG_IGN);  // a write beyond the file size limit is an error like a full disk, not a death
    set_threads(environment);
    if (needs_mpi(environment)) {
      start_mpi(&argc, &argv);
    }
    code = body(environment);
    std::cout.flush();
    end_mpi();
  });
  return static_cast<int>(code);
}

void guarded(const Environment& environment, const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    fail(environment, exit_code(error.kind()), std::string(name(error.kind())) + " error: " + error.what());
  } catch (const c10::Error& error) {
    fail(environment, ExitCode::kUnexpected, error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    fail(environment, ExitCode::kUnexpected, "out of memory");
  } catch (const std::exception& error) {
    fail(environment, ExitCode::kUnexpected, error.what());
  }
}

}  // namespace drrl
