#pragma once

#include <memory>
#include <string>
#include <vector>

#include "distributed/topology/mesh.h"
#include "models/causal_lm/config.h"
#include "policy/allocation/latency_table.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/calibration/calibration.h"
#include "policy/online/step_observer.h"

namespace drrl {

/// --near_block and --sink_tokens. Errors: Error(kUsage).
Geometry geometry_flags();

/// --rank_buckets, head_dim added as the last; those of the device (rank_buckets) if it is empty.
/// Errors: Error(kUsage).
std::vector<int64_t> bucket_flags(const at::Device& device, int64_t head_dim);

/// The calibration of --policy, read under the watchdog's eyes. Errors: Error(kModel).
Calibration read_calibration();

/// Errors: Error(kUsage) unless the calibration, read from --policy, is of a model of this shape.
void check_calibration(const Calibration& calibration, const ModelConfig& config);
/// Errors: Error(kUsage) unless it was measured with --near_block and --sink_tokens: its damages
/// are by distances in blocks.
void check_geometry(const Calibration& calibration);

/// What times depend on in this process: the device, --dtype, --near_block, --basis_updates and
/// these shapes.
LatencyKey latency_key(const at::Device& device, int64_t head_dim, int64_t heads_per_group);

/// The --latency file, checked to be of this process's device and these shapes; null if there is
/// none. Errors: Error(kModel) for the file, Error(kUsage) if it is of another case.
std::shared_ptr<const LatencyTable> latency_flag(const at::Device& device, int64_t head_dim,
                                                 int64_t heads_per_group);

/// `inputs` and those that --attention needs, for agree_on_inputs.
std::vector<std::string> attention_inputs(std::vector<std::string> inputs);

/// A controller with the rank policy and bases that --attention, --rank_policy, --rank, --energy,
/// --rank_budget, --policy and --basis_updates describe (with --latency), checked to be the same on
/// all ranks of the mesh (collective), and its observer for the trainer. Errors: Error(kUsage) for
/// values that do not fit each other or the model; Error(kModel) for a damaged --policy file.
struct AttentionSetup {
  std::shared_ptr<LowRankController> controller;
  StepObservers observers;  ///< the controller's
};
AttentionSetup attention_flags(const ModelConfig& config, const Mesh& mesh,
                               const at::Device& device);

}  // namespace drrl
