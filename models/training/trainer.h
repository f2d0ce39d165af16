#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "distributed/topology/mesh.h"
#include "models/causal_lm/causal_lm.h"
#include "models/data/sequence_dataset.h"
#include "models/training/optimizer.h"
#include "models/training/schedule.h"
#include "policy/online/step_observer.h"

namespace drrl {

struct TrainerOptions {
  int64_t micro_batch = 1;   ///< sequences in one forward and backward pass
  int64_t global_batch = 1;  ///< sequences in one update, over all ranks
  int64_t steps = 1;         ///< updates of the whole run, resumed parts included
  double clip = 1.0;         ///< largest global gradient norm, 0: off
  CosineSchedule schedule;   ///< in tokens
  AdamW::Options optimizer;

  std::filesystem::path output;  ///< metrics/ and checkpoints/ go here; empty: neither is written
  int64_t save_every = 0;   ///< steps between checkpoints; the last step and an interruption save
                            ///< anyway. 0: only those
  int64_t keep = 2;         ///< newest checkpoints to keep, 0: all
  int64_t log_every = 1;    ///< steps between logged rows
  int64_t eval_every = 0;   ///< steps between evaluations; 0: only before the first and after the
                            ///< last step
  int64_t eval_tokens = 0;  ///< tokens of one evaluation, rounded up to whole batches of sequences;
                            ///< 0: all of the validation range
  bool resume = false;  ///< continue from the newest sound checkpoint in `output`, if there is one
  bool resume_override = false;  ///< also when options that shape the run have changed

  /// Options that shape the run, as text: stored in checkpoints, compared on resume.
  std::map<std::string, std::string> fingerprint;
};

inline constexpr double kNotMeasured = std::numeric_limits<double>::quiet_NaN();

/// One logged step, the same on every rank.
struct StepReport {
  int64_t step = 0, steps = 0;
  int64_t tokens = 0;    ///< consumed so far
  double loss = 0;       ///< mean over the counted tokens of the global batch, nats
  double grad_norm = 0;  ///< before clipping
  double lr = 0;
  double tokens_per_second = 0;
  double ms_per_step = 0;
  double mean_rank_qk = kNotMeasured, mean_rank_v = kNotMeasured;
  double exact_pairs = kNotMeasured;  ///< share of the far pairs that no low rank served
  double attention_flops_fraction = kNotMeasured;
  double valid_loss = kNotMeasured;
  double eta_seconds = 0;
};

/// What the surrounding program wants to hear and may ask. Every member may be empty.
struct TrainerCallbacks {
  std::function<void(const StepReport&)> on_step;  ///< world rank 0, every logged step
  std::function<void(int64_t step, int64_t done, int64_t total)> on_microbatch;  ///< every rank
  std::function<void(const std::string&)>
      on_note;  ///< world rank 0: one sentence, e.g. "saved ..."
  std::function<void(const std::string&)> on_warning;  ///< world rank 0
  std::function<bool()> stop_requested;  ///< asked after each step; true on any rank stops all of
                                         ///< them after a checkpoint
};

struct TrainResult {
  int64_t steps = 0;  ///< updates made, resumed parts included
  int64_t tokens = 0;
  int64_t steps_this_run = 0;
  double first_loss = kNotMeasured, last_loss = kNotMeasured;  ///< of this run's steps
  double valid_loss_before = kNotMeasured,
         valid_loss_after = kNotMeasured;  ///< before: as this run found the model
  double step_seconds = 0;                 ///< in steps alone: no evaluation, no checkpoints
  bool interrupted = false;
  std::filesystem::path checkpoint;  ///< newest one of this run, empty if none was written
};

/// Trains a causal language model: per update, the global batch's microbatches forward and
/// backward, data-parallel sum, checks, clip, AdamW. The gradient is that of the mean loss over all
/// counted tokens of the global batch, whatever share each rank had.
///
/// A loss or gradient that is not finite on any rank stops all ranks before the update:
/// Error(kNumerics) naming the rank and the step.
///
/// Checkpoints hold weights, moments, random generators of every rank, consumed samples, the
/// observers' states and the options; a run resumed on the same layout (and thread count) continues
/// bit for bit, on another one equal up to rounding. What would be saved is checked first: weights
/// that are not finite are an Error(kNumerics), and the older checkpoints stay.
class Trainer {
 public:
  /// Collective over the world. `model` and `mesh` must outlive the trainer; `validation` may be
  /// null. Errors: Error(kUsage) for options that contradict each other.
  Trainer(TrainerOptions options, CausalLM& model, const Mesh& mesh,
          std::shared_ptr<const SequenceDataset> train,
          std::shared_ptr<const SequenceDataset> validation = nullptr, StepObservers observers = {},
          TrainerCallbacks callbacks = {});
  ~Trainer();

  /// Resumes if asked to, trains to the last step or until stopped, and saves. Collective over the
  /// world.
  TrainResult run();

  /// Mean loss over the validation sequences (nats per token), the same on every rank. Collective
  /// over the world.
  double evaluate();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace drrl
