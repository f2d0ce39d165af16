#pragma once

#include <array>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "core/types/block_tree.h"
#include "distributed/topology/mesh.h"
#include "models/causal_lm/config.h"

// A model of the time of a training step: amounts that are counted times costs that are fitted to
// measured runs. What drrl-bench model knows.
namespace drrl::bench {

/// What a step spends time on; kCosts (scaling_model.cpp) has names and units.
enum Cost : size_t {
  kUpdate,
  kLayer,
  kLinear,
  kExact,
  kLowRank,
  kBases,
  kSplitExact,
  kSplitLowRank,
  kReduce,
  kMessage,
  kBytes,
  kNetworkMessage,
  kNetworkBytes
};
inline constexpr size_t kCostCount = kNetworkBytes + 1;
using Amounts = std::array<double, kCostCount>;

struct CostName {
  const char* key;
  const char* unit;  ///< of an amount; a cost is ms for one
  const char* meaning;
  const char* told_by;  ///< runs that tell this cost from the others
};
extern const std::array<CostName, kCostCount> kCosts;

/// A step as drrl-bench scaling runs it: one sequence at a time, ranks fixed.
struct Workload {
  ModelConfig config;
  MeshShape shape;
  int64_t seq_len = 0;
  int64_t sequences = 0;  ///< of a step, all processes together
  int64_t rank = 0;       ///< of far pairs; head_dim or more: exact attention
  Geometry geometry;
  int64_t basis_updates = 2;
  bool first_block_bases = true;  ///< bases start from the first block's, else from a calibration
  int64_t element_bytes = 4;      ///< of activations
  int64_t processes_per_node = 1;
  int64_t threads = 1;  ///< of a process
  int64_t
      cores_per_node = 0;  ///< that the processes of a node share; 0: each has a device of its own

  int64_t world() const { return shape.tp * shape.dp * shape.cp; }
};

/// What one process, the one with the most work, has to do in a step.
struct Demand {
  Amounts amounts{};    ///< work, and communication that nothing hides: that of --tp and --cp, and
                        ///< the step's sums
  Amounts gradients{};  ///< communication that the last backward pass may hide
  double hiding = 0;    ///< share of the work that is this pass
  double busy_others = 0;    ///< how many of the node's other cores work as well, as a share
  double cores_shared = 1;   ///< processes times threads for each core of the node, at least 1
  bool out_of_turn = false;  ///< whether processes that share cores wait for each other in every
                             ///< layer, by --tp or --cp
  double sent_bytes = 0;     ///< of process 0

  bool operator==(const Demand&) const = default;
};

/// Operations as core/attention/flops.h counts them, bytes as distributed/collectives/traffic.h
/// does. A collective is as many messages after each other as trees and recursive halving need
/// (Thakur, Rabenseifner, Gropp, IJHPCA 19, 2005): log2(n), twice that for all_reduce, n - 1 for
/// all_to_all; and an all_reduce adds up (n - 1) / n of its message in each process. A group is
/// within a node if its members are neighbours there, else all of its traffic counts as the
/// network's. Errors: Error(kUsage) as parameter_layouts and SequenceSplit.
Demand demand_of(const Workload& workload);

/// A measured time of a known demand.
struct Equation {
  std::string name;
  Demand demand;
  double ms = 0;
  double weight = 1;
  double yardstick_ms = 0;  ///< what a fixed amount of work took on the slowest of its processors
                            ///< at the time; 0: not measured, taken for the usual

  /// The time without the drift of the machine's speed, for comparing.
  double paced() const { return yardstick_ms > 0 ? ms / yardstick_ms : ms; }
};

/// Of equations of the same name and demand, a run that was measured several times, the one of the
/// median `paced` time (of an even number the lower), in the order of the first of each.
std::vector<Equation> medians(const std::vector<Equation>& equations);

struct StepMs {
  double work = 0;       ///< of the processor
  double exposed = 0;    ///< communication that nothing hides
  double gradients = 0;  ///< what is left to see of the gradients' communication
  double total() const { return work + exposed + gradients; }
};

/// work = (1 + contention busy_others) x sum of costs; gradients = all of theirs - overlap x the
/// smaller of them and the last backward pass; all of it times cores_shared, as processes that
/// share a core take turns, and 1 + waiting where they are out of turn: the one that others wait
/// for may not be the one that has the core.
struct StepModel {
  enum class Source { kUnknown, kMeasured, kGiven };

  Amounts costs{};  ///< [ms]
  std::array<Source, kCostCount> sources{};
  double contention = 0;  ///< by how much work takes longer when all other cores of the node work
  double overlap = 0;     ///< of the gradients' communication with work: 0 none, 1 perfect
  double waiting = 0;     ///< by how much all takes longer where processes that wait for each other
                          ///< share cores
  double yardstick_ms = 0;  ///< at the speed that the costs are meant for, the median of the
                            ///< equations that it is fitted to; 0: they have none

  /// By how much the machine was slower when the equation was measured than the costs are meant
  /// for. Errors: Error(kUsage) beyond a factor of 8 either way: no drift, but another amount of
  /// work.
  double pace(const Equation& equation) const;

  /// Least squares of relative errors, no cost negative; contention, overlap and waiting by search
  /// in [0, 1]. Errors: Error(kUsage) if the equations cannot tell a cost from the others, naming
  /// it and what would.
  static StepModel fit(const std::vector<Equation>& equations);

  /// Errors: Error(kUsage) naming a cost that is needed and unknown.
  StepMs predict(const Demand& demand) const;
};

/// What files of drrl-bench scaling, launch/bench/scaling.sh or drrl-bench collectives say.
struct Measured {
  std::vector<Equation>
      equations;  ///< of runs the step, and the Grams and bases where they are measured apart
  std::vector<Workload> workloads;  ///< of its runs
};

/// `setting`: device, precision, threads and versions, taken from the first file that is read,
/// expected of the others. Errors: Error(kUsage) naming the file and what is wrong: not JSON,
/// another benchmark, a missing field, another setting, bytes that are not those that are counted
/// here.
Measured read_measured(const std::filesystem::path& path, std::optional<std::string>& setting);

/// Writes such a file, and only what read_measured takes. Errors: also those of FileWriter.
void write_measured(const std::filesystem::path& path, const nlohmann::ordered_json& json);

}  // namespace drrl::bench
