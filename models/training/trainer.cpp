#include "models/training/trainer.h"

#include <sys/resource.h>

#include <chrono>
#include <cmath>

#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "models/causal_lm/model_folder.h"
#include "models/causal_lm/tensor_parallel.h"
#include "models/training/checkpoint.h"
#include "models/training/gradient_reducer.h"
#include "models/training/metrics.h"
#include "models/training/training_state.h"

namespace drrl {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Sums over all ranks of one step, in one message.
struct Totals {
  double loss_sum = 0, tokens = 0;  // counted once per data- and context-parallel rank
  double squared_norm = 0;          // counted once per tensor-parallel rank
  double bad_ranks = 0, stops = 0;  // counted once per rank
  AttentionStatistics attention;    // counted once per rank; only what a report shows

  std::vector<double> pack() const {
    std::vector<double> all = {loss_sum, tokens, squared_norm, bad_ranks, stops};
    const std::vector<double> counts = attention.counts();
    all.insert(all.end(), counts.begin(), counts.end());
    return all;
  }
  static Totals unpack(const std::vector<double>& v) {
    Totals t{v[0], v[1], v[2], v[3], v[4], {}};
    t.attention.set_counts({v.begin() + 5, v.end()});
    return t;
  }
};

double peak_memory_gib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / (1024.0 * 1024.0);  // ru_maxrss is in KiB
}

}  // namespace

struct Trainer::Impl {
  Impl(TrainerOptions options_in, CausalLM& model_in, const Mesh& mesh_in,
       std::shared_ptr<const SequenceDataset> train_in,
       std::shared_ptr<const SequenceDataset> validation_in, StepObservers observers_in,
       TrainerCallbacks callbacks_in)
      : options(std::move(options_in)),
        model(model_in),
        mesh(mesh_in),
        train(std::move(train_in)),
        validation(std::move(validation_in)),
        observers(std::move(observers_in)),
        callbacks(std::move(callbacks_in)),
        optimizer(model_in.parameters(), options.optimizer),
        reducer(model_in.parameters(), mesh.data(), mesh.kv()),
        device(model_in.parameters().front().value.device()) {
    check_options();
  }

  void check_options() const {
    if (device.is_cpu()) {
      int64_t weights = 0;
      for (const Parameter& parameter : model.parameters()) {
        weights += parameter.value.numel();
      }
      check_memory(3.0 * static_cast<double>(weights) *
                       static_cast<double>(model.parameters().front().value.element_size()),
                   c10::str("gradients and both moments of ", weights, " weights"));
    }
    check(ErrorKind::kUsage, options.micro_batch >= 1, "micro_batch must be at least 1, got ",
          options.micro_batch);
    check(ErrorKind::kUsage, options.global_batch >= 1, "global_batch must be at least 1, got ",
          options.global_batch);
    check(ErrorKind::kUsage, options.global_batch >= mesh.dp().size(),
          "global_batch = ", options.global_batch, " sequences cannot be shared out to ",
          mesh.dp().size(), " data-parallel ranks");
    check(ErrorKind::kUsage, model.context().size() == mesh.cp().size(),
          "the model's attention splits sequences over ", model.context().size(),
          " processes, the mesh over ", mesh.cp().size());
    check(ErrorKind::kUsage, model.kv_sharers().count == mesh.kv().size(), model.kv_sharers().count,
          " tensor-parallel ranks hold this one's KV heads, the mesh has ", mesh.kv().size(),
          " of them (MeshShape::kv_heads)");
    check(ErrorKind::kUsage, options.steps >= 1, "steps must be at least 1, got ", options.steps);
    check(ErrorKind::kUsage, options.clip >= 0, "clip must not be negative, got ", options.clip);
    check(ErrorKind::kUsage, options.log_every >= 1, "log_every must be at least 1, got ",
          options.log_every);
    check(ErrorKind::kUsage,
          options.save_every >= 0 && options.eval_every >= 0 && options.eval_tokens >= 0 &&
              options.keep >= 0,
          "save_every, eval_every, eval_tokens and keep must not be negative, got ",
          options.save_every, ", ", options.eval_every, ", ", options.eval_tokens, ", ",
          options.keep);
    options.schedule.validate();
  }

  TrainerOptions options;
  CausalLM& model;
  const Mesh& mesh;
  std::shared_ptr<const SequenceDataset> train, validation;
  StepObservers observers;
  TrainerCallbacks callbacks;
  AdamW optimizer;
  GradientReducer reducer;
  at::Device device;
  TrainingPosition position;
  int64_t first_step = 0;                  // of this run
  std::unique_ptr<MetricsWriter> metrics;  // null: no row yet
  bool stop = false;                       // agreed on by all ranks

  bool leader() const { return mesh.world().rank() == 0; }

  void note(const std::string& text) const {
    if (leader() && callbacks.on_note) {
      callbacks.on_note(text);
    }
  }

  void sign_of_life() const {
    if (const auto& watchdog = mesh.world().watchdog()) {
      watchdog->alive();
    }
  }

  TrainingState state() { return {model, optimizer, mesh, observers, options.fingerprint}; }

  /// values <- sum over the whole world, the same bits on every rank.
  std::vector<double> sum_over_world(const std::vector<double>& values) const {
    at::Tensor sums = at::tensor(values, at::kDouble).to(device);
    mesh.tp().all_reduce(sums);
    mesh.data().all_reduce(sums);
    sums = sums.cpu();
    return {sums.data_ptr<double>(), sums.data_ptr<double>() + sums.numel()};
  }

  /// Every rank throws, naming the first rank that saw something wrong itself.
  [[noreturn]] void stop_not_finite(int64_t step, bool bad_loss, bool bad_gradient,
                                    double norm) const {
    constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
    const int64_t mine = bad_loss       ? 2 * mesh.world().rank()
                         : bad_gradient ? 2 * mesh.world().rank() + 1
                                        : kNone;
    at::Tensor first = at::full({1}, mine, at::TensorOptions(device).dtype(at::kLong));
    mesh.tp().all_reduce(first, ReduceOp::kMin);
    mesh.data().all_reduce(first, ReduceOp::kMin);
    const int64_t code = first.item<int64_t>();
    if (code == kNone) {
      raise(ErrorKind::kNumerics, "step ", step, ": the gradient norm over all ranks is ", norm,
            "; stopped before the update");
    }
    raise(ErrorKind::kNumerics, "step ", step, ": the ", code % 2 == 0 ? "loss" : "gradient",
          " of world rank ", code / 2, " is not finite; stopped before the update");
  }

  /// One update. Fills loss, norm, rate and attention figures of `report`.
  void step(StepReport& report) {
    const int64_t number = position.step + 1;
    const auto watched = watch_step(mesh.world().watchdog(), number);
    for (const auto& observer : observers) {
      observer->begin_step(number);
    }
    const IndexRange share = partition(options.global_batch, mesh.dp().size(), mesh.dp().rank());
    const int64_t microbatches = (share.count + options.micro_batch - 1) / options.micro_batch;
    // Gradients are taken of loss_sum / (all positions of the global batch); should fewer labels
    // count, the rest of the factor is known after the step's one message and goes into the
    // optimizer's gradient scale.
    const double positions = static_cast<double>(options.global_batch * train->seq_len());
    Totals mine;
    reducer.begin();
    for (int64_t m = 0; m < microbatches; ++m) {
      const int64_t first = share.begin + m * options.micro_batch;
      const Batch batch = train->samples(
          position.samples + first,
          std::min(options.micro_batch, share.begin + share.count - first));
      // During the last backward pass, gradients travel as soon as they are final.
      model.on_gradients_complete(m + 1 == microbatches
                                      ? [this](int64_t from) { reducer.complete_from(from); }
                                      : std::function<void(int64_t)>());
      const LossResult loss = model.loss(batch.tokens.to(device), batch.labels.to(device),
                                         1.0 / positions);
      loss.loss_sum.backward();
      mine.loss_sum += loss.loss_sum.item<double>();
      mine.tokens += static_cast<double>(loss.tokens);
      sign_of_life();
      if (callbacks.on_microbatch) {
        callbacks.on_microbatch(number, m + 1, microbatches);
      }
    }
    const bool own_gradient_finite = reducer.finish();
    const double own_squared_norm = squared_gradient_norm(model.parameters(), mesh.tp(), mesh.kv())
                                        .item<double>();

    const bool bad_loss = !std::isfinite(mine.loss_sum);
    const bool bad_gradient = !own_gradient_finite ||
                              (mesh.data().size() == 1 && mesh.kv().size() == 1 &&
                               !std::isfinite(own_squared_norm));
    mine.bad_ranks = bad_loss || bad_gradient ? 1 : 0;
    mine.stops = callbacks.stop_requested && callbacks.stop_requested() ? 1 : 0;
    mine.squared_norm = mesh.data().rank() == 0 ? own_squared_norm : 0;
    if (mesh.tp().rank() != 0) {
      mine.loss_sum = 0;
      mine.tokens = 0;
    }
    for (const auto& observer : observers) {
      observer->end_step(mine.attention);
    }
    const std::vector<double> sums = sum_over_world(mine.pack());
    const Totals all = Totals::unpack(sums);

    check(ErrorKind::kData, all.tokens > 0, "step ", number,
          ": no label of the global batch counts");
    const double rescale = positions / all.tokens;
    const double norm = std::sqrt(all.squared_norm) * rescale;
    if (all.bad_ranks > 0 || !std::isfinite(norm) || !std::isfinite(all.loss_sum)) {
      stop_not_finite(number, bad_loss, bad_gradient, norm);
    }
    const int64_t tokens_after = position.tokens + options.global_batch * train->seq_len();
    const double lr = options.schedule.rate(tokens_after);
    optimizer.step(lr, rescale * clip_factor(norm, options.clip));

    position = {number, position.samples + options.global_batch, tokens_after};
    stop = all.stops > 0;
    report.loss = all.loss_sum / all.tokens;
    report.grad_norm = norm;
    report.lr = lr;
    if (all.attention.decisions > 0) {
      report.mean_rank_qk = all.attention.mean_rank_qk(0);
      report.mean_rank_v = all.attention.mean_rank_v(0);
      report.exact_pairs = static_cast<double>(all.attention.exact_pairs) /
                           static_cast<double>(all.attention.decisions);
    }
    if (all.attention.exact_flops > 0) {
      report.attention_flops_fraction = all.attention.flops / all.attention.exact_flops;
    }
  }

  double evaluate() {
    check(ErrorKind::kUsage, validation != nullptr, "there is no validation data");
    const auto watched = watch(mesh.world().watchdog(), "evaluation");
    const at::NoGradGuard no_grad;
    int64_t windows = validation->windows();
    if (options.eval_tokens > 0) {
      windows = std::min(windows, (options.eval_tokens - 1) / validation->seq_len() + 1);
    }
    const IndexRange share = partition(windows, mesh.dp().size(), mesh.dp().rank());
    double nll = 0;
    double tokens = 0;
    for (int64_t first = share.begin; first < share.begin + share.count;
         first += options.micro_batch) {
      const Batch batch = validation->ordered(
          first, std::min(options.micro_batch, share.begin + share.count - first));
      nll += model.token_nll(batch.tokens.to(device), batch.labels.to(device))
                 .sum(at::kDouble)
                 .item<double>();
      tokens += static_cast<double>((batch.labels != kIgnoredLabel).sum().item<int64_t>());
      sign_of_life();
    }
    const bool counts = mesh.tp().rank() == 0 &&
                        mesh.cp().rank() ==
                            0;  // every one of them has the loss of the whole sequences
    const auto sums = sum_over_world({counts ? nll : 0.0, counts ? tokens : 0.0});
    return sums[0] / sums[1];
  }

  /// A weight that memory or the last update broke after the step's checks must not replace a sound
  /// checkpoint.
  void check_finite_weights() const {
    const at::NoGradGuard no_grad;
    at::Tensor sum = at::zeros({}, at::TensorOptions(device).dtype(at::kDouble));
    for (const Parameter& parameter : model.parameters()) {
      sum += parameter.value.sum(at::kDouble);  // not finite as soon as one of them is not
    }
    const double bad = std::isfinite(sum.item<double>())
                           ? 0.0
                           : static_cast<double>(mesh.world().rank() + 1);
    at::Tensor worst = at::full({1}, bad, at::TensorOptions(device).dtype(at::kDouble));
    mesh.world().all_reduce(worst, ReduceOp::kMax);
    check(ErrorKind::kNumerics, worst.item<double>() == 0.0, "step ", position.step,
          ": weights of world rank ", static_cast<int64_t>(worst.item<double>()) - 1,
          " are not finite; no checkpoint was written");
  }

  std::filesystem::path save() {
    const auto watched = watch(mesh.world().watchdog(), "checkpoint");
    const auto start = Clock::now();
    check_finite_weights();
    const auto folder = save_training_state(options.output / "checkpoints", state(), position,
                                            options.keep);
    note(c10::str("saved ", folder.string(), " in ",
                  static_cast<int64_t>(seconds_since(start) * 1000), " ms"));
    return folder;
  }

  /// Refuses an output that holds another run, or resumes from it as the options say.
  void restore() {
    const auto watched = watch(mesh.world().watchdog(), "restoring");
    const auto root = options.output / "checkpoints";
    // World rank 0 looks, all of them hear: a shared file system may show the folder late to some.
    const bool exists = leader() && CheckpointReader::any(root);
    const bool any = sum_over_world({exists ? 1.0 : 0.0})[0] > 0;
    check(ErrorKind::kUsage, options.resume || !any, options.output.string(),
          " already holds checkpoints: resume that run (--resume), or choose another folder "
          "(--output)");
    if (!options.resume) {
      return;
    }
    const auto restored = restore_training_state(root, state(), options.resume_override,
                                                 [&](const std::string& text) {
                                                   if (callbacks.on_warning) {
                                                     callbacks.on_warning(text);
                                                   }
                                                 });
    if (restored) {
      position = *restored;
      note(c10::str("resumed after step ", position.step, " (", position.tokens, " tokens)"));
    } else {
      note("nothing to resume: starting from the beginning");
    }
  }

  /// Writes a row of metrics. The file is opened by the first: a run that is refused before leaves
  /// no trace.
  void log(const MetricRow& row) {
    if (!options.output.empty() && leader()) {
      if (!metrics) {
        metrics = std::make_unique<MetricsWriter>(options.output / "metrics", first_step);
      }
      metrics->write(row);
    }
  }

  void evaluate_before(TrainResult& result) {
    result.valid_loss_before = evaluate();
    note(c10::str("validation loss before training ", result.valid_loss_before));
    if (position.step == 0) {
      MetricRow row{0, {}};
      row.set("valid_loss", result.valid_loss_before);
      row.set("valid_ppl", std::exp(result.valid_loss_before));
      log(row);
    }
  }

  /// Steps since the last logged row.
  struct Unlogged {
    double seconds = 0;
    int64_t steps = 0;
  };

  void log_step(StepReport& report, const TrainResult& result, Unlogged& unlogged) {
    report.step = position.step;
    report.steps = options.steps;
    report.tokens = position.tokens;
    report.tokens_per_second = static_cast<double>(unlogged.steps * options.global_batch *
                                                   train->seq_len()) /
                               unlogged.seconds;
    report.ms_per_step = unlogged.seconds * 1000.0 / static_cast<double>(unlogged.steps);
    report.eta_seconds = result.step_seconds / static_cast<double>(result.steps_this_run) *
                         static_cast<double>(options.steps - position.step);
    unlogged = {};
    MetricRow row = to_row(report);
    for (const auto& observer : observers) {
      const auto figures = observer->figures();
      row.values.insert(row.values.end(), figures.begin(), figures.end());
    }
    log(row);
    if (leader() && callbacks.on_step) {
      callbacks.on_step(report);
    }
  }

  TrainResult run() {
    const bool has_output = !options.output.empty();
    if (has_output) {
      restore();
    }
    const auto watched = watch(mesh.world().watchdog(), "training");
    first_step = position.step;
    TrainResult result;
    result.steps = position.step;
    result.tokens = position.tokens;
    if (validation && position.step < options.steps) {
      evaluate_before(result);
    }
    Unlogged unlogged;
    while (position.step < options.steps && !stop) {
      StepReport report;
      const auto start = Clock::now();
      step(report);
      const double elapsed = seconds_since(start);
      result.step_seconds += elapsed;
      unlogged.seconds += elapsed;
      ++unlogged.steps;
      ++result.steps_this_run;
      if (result.steps_this_run == 1) {
        result.first_loss = report.loss;
      }
      result.last_loss = report.loss;

      const bool last = position.step == options.steps;
      // Whoever asked to stop may kill the process soon: save first, evaluate never.
      const bool evaluates = validation && !(stop && !last) && (last || due(options.eval_every));
      if (evaluates) {
        report.valid_loss = evaluate();
        if (last) {
          result.valid_loss_after = report.valid_loss;
        }
      }
      if (due(options.log_every) || last || stop || evaluates || result.steps_this_run == 1) {
        log_step(report, result, unlogged);
      }
      if (has_output && (last || stop || due(options.save_every))) {
        result.checkpoint = save();
      }
    }
    result.steps = position.step;
    result.tokens = position.tokens;
    result.interrupted = stop && position.step < options.steps;
    return result;
  }

  bool due(int64_t every) const { return every > 0 && position.step % every == 0; }

  MetricRow to_row(const StepReport& report) const {
    MetricRow row{report.step, {}};
    row.set("loss", report.loss);
    row.set("grad_norm", report.grad_norm);
    row.set("lr", report.lr);
    row.set("tokens", static_cast<double>(report.tokens));
    row.set("tokens_per_second", report.tokens_per_second);
    row.set("ms_per_step", report.ms_per_step);
    row.set("mean_rank_qk", report.mean_rank_qk);
    row.set("mean_rank_v", report.mean_rank_v);
    row.set("attention_flops_fraction", report.attention_flops_fraction);
    row.set("exact_pairs", report.exact_pairs);
    row.set("valid_loss", report.valid_loss);
    row.set("valid_ppl", std::exp(report.valid_loss));
    row.set("memory_gib", peak_memory_gib());
    return row;
  }
};

Trainer::Trainer(TrainerOptions options, CausalLM& model, const Mesh& mesh,
                 std::shared_ptr<const SequenceDataset> train,
                 std::shared_ptr<const SequenceDataset> validation, StepObservers observers,
                 TrainerCallbacks callbacks)
    : impl_(std::make_unique<Impl>(std::move(options), model, mesh, std::move(train),
                                   std::move(validation), std::move(observers),
                                   std::move(callbacks))) {}

Trainer::~Trainer() = default;

TrainResult Trainer::run() {
  return impl_->run();
}

double Trainer::evaluate() {
  return impl_->evaluate();
}

}  // namespace drrl
