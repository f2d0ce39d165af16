#include "distributed/topology/environment.h"

#include <charconv>
#include <cstdlib>
#include <vector>

#include "core/error.h"

namespace drrl {
namespace {

int64_t parse(const std::string& variable, const std::string& text, int64_t low, int64_t high) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, status] = std::from_chars(text.data(), end, value);
  check(ErrorKind::kUsage, status == std::errc() && stop == end && !text.empty(),
        "environment variable ", variable, "='", text, "' is not a whole number");
  check(ErrorKind::kUsage, low <= value && value <= high, "environment variable ", variable, "=",
        text, " is not between ", low, " and ", high);
  return value;
}

// The variables of one launcher, read strictly.
class Reader {
 public:
  Reader(const Environment::Getter& get, Launcher launcher) : get_(get), launcher_(launcher) {}

  std::string text(const std::string& variable) const {
    auto value = get_(variable);
    check(ErrorKind::kUsage, value.has_value(), "this process looks started by ", name(launcher_),
          ", but the environment variable ", variable, " is not set");
    return *value;
  }

  int64_t number(const std::string& variable, int64_t low, int64_t high) const {
    return parse(variable, text(variable), low, high);
  }

  int64_t number_or(const std::string& variable, int64_t low, int64_t high,
                    int64_t otherwise) const {
    const auto value = get_(variable);
    return value ? parse(variable, *value, low, high) : otherwise;
  }

 private:
  const Environment::Getter& get_;
  Launcher launcher_;
};

constexpr int64_t kMaxProcesses = int64_t{1} << 31;

// "4(x2),3" -> entry `node` of {4, 4, 3}.
int64_t tasks_on_node(const std::string& variable, const std::string& text, int64_t node) {
  int64_t first = 0;
  std::size_t begin = 0;
  while (begin <= text.size()) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string entry = text.substr(begin, end - begin);
    const std::size_t bracket = entry.find("(x");
    const int64_t tasks = parse(variable, entry.substr(0, bracket), 1, kMaxProcesses);
    int64_t nodes = 1;
    if (bracket != std::string::npos) {
      check(ErrorKind::kUsage, entry.back() == ')', "environment variable ", variable, "='", text,
            "' is not of the form '4(x2),3'");
      nodes = parse(variable, entry.substr(bracket + 2, entry.size() - bracket - 3), 1,
                    kMaxProcesses);
    }
    if (node < first + nodes) {
      return tasks;
    }
    first += nodes;
    begin = end + 1;
  }
  raise(ErrorKind::kUsage, "environment variable ", variable, "='", text,
        "' has no entry for SLURM_NODEID=", node);
}

void read_master(Environment& environment, const Reader& reader, const Environment::Getter& get,
                 bool required) {
  if (required || get("MASTER_ADDR")) {
    environment.master_address = reader.text("MASTER_ADDR");
    check(ErrorKind::kUsage, !environment.master_address->empty(),
          "environment variable MASTER_ADDR is empty");
  }
  if (required || get("MASTER_PORT")) {
    environment.master_port = reader.number("MASTER_PORT", 1, 65535);
  }
}

Environment from_torchrun(const Environment::Getter& get) {
  const Reader reader(get, Launcher::kTorchrun);
  Environment result;
  result.launcher = Launcher::kTorchrun;
  result.world_size = reader.number("WORLD_SIZE", 1, kMaxProcesses);
  result.world_rank = reader.number("RANK", 0, result.world_size - 1);
  result.local_size = reader.number_or("LOCAL_WORLD_SIZE", 1, result.world_size, result.world_size);
  result.local_rank = reader.number("LOCAL_RANK", 0, result.local_size - 1);
  result.agent_store = get("TORCHELASTIC_USE_AGENT_STORE") == "True";
  result.restart_count = reader.number_or("TORCHELASTIC_RESTART_COUNT", 0, kMaxProcesses, 0);
  read_master(result, reader, get, /*required=*/true);
  return result;
}

Environment from_mpirun(const Environment::Getter& get) {
  const Reader reader(get, Launcher::kMpirun);
  Environment result;
  result.launcher = Launcher::kMpirun;
  result.world_size = reader.number("OMPI_COMM_WORLD_SIZE", 1, kMaxProcesses);
  result.world_rank = reader.number("OMPI_COMM_WORLD_RANK", 0, result.world_size - 1);
  result.local_size = reader.number("OMPI_COMM_WORLD_LOCAL_SIZE", 1, result.world_size);
  result.local_rank = reader.number("OMPI_COMM_WORLD_LOCAL_RANK", 0, result.local_size - 1);
  read_master(result, reader, get, /*required=*/false);
  return result;
}

Environment from_srun(const Environment::Getter& get) {
  const Reader reader(get, Launcher::kSrun);
  Environment result;
  result.launcher = Launcher::kSrun;
  result.world_size = reader.number("SLURM_STEP_NUM_TASKS", 1, kMaxProcesses);
  result.world_rank = reader.number("SLURM_PROCID", 0, result.world_size - 1);
  result.local_size = result.world_size;
  if (const auto tasks = get("SLURM_STEP_TASKS_PER_NODE")) {
    result.local_size = tasks_on_node("SLURM_STEP_TASKS_PER_NODE", *tasks,
                                      reader.number_or("SLURM_NODEID", 0, kMaxProcesses, 0));
    check(ErrorKind::kUsage, result.local_size <= result.world_size,
          "environment variables SLURM_STEP_TASKS_PER_NODE=", *tasks,
          " and SLURM_STEP_NUM_TASKS=", result.world_size, " contradict each other");
  }
  result.local_rank = reader.number("SLURM_LOCALID", 0, result.local_size - 1);
  read_master(result, reader, get, /*required=*/false);
  return result;
}

// A program started by mpirun or srun may carry RANK and WORLD_SIZE too (wrappers export them for
// PyTorch): then they must agree.
void check_agrees_with_torch_variables(const Environment& environment,
                                       const Environment::Getter& get) {
  const auto check_equal = [&](const std::string& variable, int64_t expected) {
    if (const auto text = get(variable)) {
      check(ErrorKind::kUsage, parse(variable, *text, 0, kMaxProcesses) == expected,
            "environment variable ", variable, "=", *text, " contradicts ",
            name(environment.launcher), ", which says ", expected, " (unset ", variable,
            ", or start the program with one launcher)");
    }
  };
  check_equal("RANK", environment.world_rank);
  check_equal("WORLD_SIZE", environment.world_size);
}

// Variables of launchers that start the processes of other MPIs than Open MPI: each process would
// take itself for the only one.
struct ForeignLauncher {
  const char *rank, *size;
};
constexpr ForeignLauncher kForeignLaunchers[] = {
    {"PMI_RANK", "PMI_SIZE"},  // MPICH, Intel MPI, Cray PALS, Flux; srun --mpi=pmi2 sets them to
                               // its own numbers
    {"MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"}};

void check_not_foreign(const Environment& environment, const Environment::Getter& get) {
  for (const auto& [rank, size] : kForeignLaunchers) {
    const auto text = get(size);
    const int64_t processes = text ? parse(size, *text, 0, kMaxProcesses) : 0;
    check(ErrorKind::kUsage, processes <= 1 || processes == environment.world_size,
          "started by another MPI's launcher as rank ", get(rank).value_or("?"), " of ", processes,
          " (", rank, ", ", size,
          "), but this program is linked to Open MPI, for which it is rank ",
          environment.world_rank, " of ", environment.world_size,
          ": start it with Open MPI's mpirun, with srun --mpi=pmix or with torchrun");
  }
}

}  // namespace

const char* name(Launcher launcher) noexcept {
  switch (launcher) {
    case Launcher::kSingle: return "single";
    case Launcher::kMpirun: return "mpirun";
    case Launcher::kSrun: return "srun";
    case Launcher::kTorchrun: return "torchrun";
  }
  return "unknown";
}

Environment Environment::detect(const Getter& get) {
  if (get("TORCHELASTIC_RUN_ID")) {
    return from_torchrun(get);
  }
  Environment result;
  if (get("OMPI_COMM_WORLD_RANK") || get("OMPI_COMM_WORLD_SIZE")) {
    result = from_mpirun(get);
  } else if (get("SLURM_STEP_NUM_TASKS")) {
    result = from_srun(get);
    check_not_foreign(result,
                      get);  // MPICH's mpiexec may start its processes below an srun of its own
  } else if (get("RANK") || get("WORLD_SIZE")) {
    return from_torchrun(get);
  } else {
    check_not_foreign(result, get);
    return result;
  }
  check_agrees_with_torch_variables(result, get);
  return result;
}

Environment Environment::detect() {
  return detect([](const std::string& variable) -> std::optional<std::string> {
    const char* value = std::getenv(variable.c_str());
    return value ? std::optional<std::string>(value) : std::nullopt;
  });
}

}  // namespace drrl
