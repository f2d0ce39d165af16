#pragma once

#include <functional>
#include <string>

#include "distributed/topology/environment.h"
#include "distributed/topology/mesh.h"
#include "launch/runtime/exit_codes.h"
#include "launch/runtime/process.h"

namespace drrl {

/// The frame of every drrl program: allocator settings, command line, threads, MPI (when mpirun or
/// srun started several processes), glog, signals, and the translation of exceptions into exit
/// codes. `command` is as in parse_options; `body` returns the code of a run that came to its own
/// end, the same on all ranks.
///
/// An exception on any rank ends the whole job with that rank's code (MPI_Abort): nobody is left
/// waiting in a collective. All ranks report a failure that all of them see, but rank 0 does so at
/// once and ends the job; the others wait a moment first, and so speak only of what rank 0 does not
/// know.
///
/// `body` is called when all processes have been found to be started alike (agree_on_options);
/// `command` is "drrl-train", "drrl-policy record", ...
int run_program(int argc, char** argv, const std::string& command, const std::string& summary,
                const std::function<ExitCode(const Environment&)>& body);

/// Runs `work` and, when it throws, ends the job from inside the handler: what was constructed
/// before `guarded` is not destroyed, so no group or pending collective waits for ranks that will
/// not come. Programs put everything after the creation of groups in here.
void guarded(const Environment& environment, const std::function<void()>& work);

/// Mesh::create with --timeout_s, watched by the watchdog. Warns if Slurm was asked for several
/// processes and this is the only one.
Mesh create_mesh(const Environment& environment, MeshShape shape, at::Device device);

/// Whether stdout ends on a terminal. mpirun gives its processes a terminal of its own, so there
/// its own stdout is what counts.
bool stdout_is_terminal(const Environment& environment);

/// For programs that save before they stop, first thing in main: from now on SIGTERM, SIGINT,
/// SIGHUP and SIGUSR1 only ask them to. Those that came while they were blocked (env
/// --block-signal) count. SIGHUP stays ignored where it is (nohup). The third SIGTERM or SIGINT
/// ends the process at once, unless it follows the one before within two seconds: launchers and
/// schedulers send a signal twice.
void watch_stop_signals() noexcept;

/// Whether such a signal has come since.
/// To stop a job under mpirun send SIGUSR1 to mpirun, which passes it on. After a SIGTERM or a
/// Ctrl-C, mpirun kills its processes within two seconds; with
/// --mca odls_base_sigkill_timeout 60 it waits 60 s, sends them SIGTERM, waits again, and ends with
/// a code of its own.
bool stop_requested() noexcept;

}  // namespace drrl
