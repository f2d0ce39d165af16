#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace drrl {

/// Who started this process.
enum class Launcher {
  kSingle,   ///< nobody: a world of one
  kMpirun,   ///< Open MPI's mpirun
  kSrun,     ///< SLURM's srun
  kTorchrun  ///< torchrun, or a program that sets the same RANK, WORLD_SIZE, ... by hand
};

/// "single", "mpirun", "srun", "torchrun".
const char* name(Launcher launcher) noexcept;

/// Where this process stands in its job, as its launcher tells through environment variables:
///
/// - torchrun: RANK, WORLD_SIZE; LOCAL_RANK, LOCAL_WORLD_SIZE; MASTER_ADDR, MASTER_PORT.
/// - mpirun: OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE; OMPI_COMM_WORLD_LOCAL_RANK,
///   OMPI_COMM_WORLD_LOCAL_SIZE; the same master, when set.
/// - srun: SLURM_PROCID, SLURM_STEP_NUM_TASKS; SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE; the same
///   master, when set.
///
/// Each line gives world rank and size, local rank and size, master address and port.
///
/// The innermost launcher wins: TORCHELASTIC_RUN_ID marks a worker of torchrun even when mpirun or
/// srun started the agent, and mpirun inside a SLURM allocation is mpirun. A batch script that srun
/// did not start (no SLURM_STEP_NUM_TASKS) is a single process. Processes of other MPIs' launchers
/// (PMI_SIZE > 1, unless srun set it) are refused.
struct Environment {
  Launcher launcher = Launcher::kSingle;
  int64_t world_rank = 0;
  int64_t world_size = 1;
  int64_t local_rank = 0;
  int64_t local_size = 1;  ///< processes on this node; world_size where the launcher does not tell

  std::optional<std::string> master_address;
  std::optional<int64_t> master_port;

  bool agent_store = false;   ///< torchrun's agent serves the store at the master address; every
                              ///< worker is a client
  int64_t restart_count = 0;  ///< TORCHELASTIC_RESTART_COUNT: keys of an earlier attempt may still
                              ///< be in the agent's store

  /// Reads a variable; nullopt when it is not set.
  using Getter = std::function<std::optional<std::string>(const std::string& variable)>;

  /// Errors: Error(kUsage) naming the variable and its value when one is missing, not a number, out
  /// of range, or in contradiction to another.
  static Environment detect(const Getter& get);

  /// From the variables of this process.
  static Environment detect();
};

}  // namespace drrl
