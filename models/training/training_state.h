#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>

#include "distributed/topology/mesh.h"
#include "models/causal_lm/causal_lm.h"
#include "models/training/optimizer.h"
#include "policy/online/step_observer.h"

namespace drrl {

/// How far a run has come.
struct TrainingPosition {
  int64_t step = 0;     ///< updates made
  int64_t samples = 0;  ///< global samples consumed: the data position
  int64_t tokens = 0;   ///< tokens consumed: the position of the learning rate schedule
};

/// Everything that a run needs to continue. Files of a checkpoint (models/training/checkpoint.h):
///   run.json                 position, layout, fingerprint of the options; by world rank 0
///   shard-tpT.safetensors    weights ("model.NAME") and moments ("optimizer.exp_avg.NAME", ...) of
///                            tensor-parallel rank T; by its data-parallel rank 0, because all of
///                            them hold the same
///   rank-tpT-dpD.safetensors random generators of one rank
///   rank-tpT-dpD.NAME        state of the observer of that name (StepObserver::state_name)
struct TrainingState {
  CausalLM& model;
  AdamW& optimizer;
  const Mesh& mesh;
  const StepObservers& observers;
  std::map<std::string, std::string> fingerprint;
};

/// Writes a checkpoint under `root` and returns its folder. Collective over the world. Errors:
/// Error(kStorage) on every rank.
std::filesystem::path save_training_state(const std::filesystem::path& root,
                                          const TrainingState& state,
                                          const TrainingPosition& position, int64_t keep);

/// Loads the newest sound checkpoint under `root`; nullopt if there never was one. Collective over
/// the world. The layout may be another than that which wrote it: each rank takes what it holds of
/// weights and moments out of the shards that overlap, and generators and observers' states of the
/// rank with its numbers modulo the old sizes. `warn` hears of damaged checkpoints that were passed
/// over and, with `allow_changes`, of options that differ. Errors: Error(kCheckpoint) for damage,
/// other tensors, or (without `allow_changes`) other options.
std::optional<TrainingPosition> restore_training_state(
    const std::filesystem::path& root, const TrainingState& state, bool allow_changes,
    const std::function<void(const std::string&)>& warn);

}  // namespace drrl
