// drrl-bench scaling: training steps on the processes that the program was started with, and what
// of their time is communication and decompositions. launch/bench/scaling.sh runs several numbers
// of processes and compares them.

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <iostream>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <thread>

#include <ATen/Parallel.h>
#include <gflags/gflags.h>

#include "core/cpu_clock.h"
#include "core/error.h"
#include "core/io/file_io.h"
#include "distributed/topology/mesh.h"
#include "launch/bench/bench.h"
#include "launch/bench/scaling_model.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/options/policy_flags.h"
#include "launch/runtime/agreement.h"
#include "launch/runtime/console.h"
#include "launch/runtime/program.h"
#include "launch/runtime/traffic_report.h"
#include "models/causal_lm/causal_lm.h"
#include "models/data/sequence_dataset.h"
#include "models/data/token_file.h"
#include "models/training/trainer.h"

DEFINE_string(
    scaling, "weak",
    "scaling, model: weak: a step has --sequences for each process; strong: --sequences in all");
DEFINE_int64(
    sequences, 2,
    "scaling, model: sequences of a step, for each process or in all, see --scaling [sequences]");
DEFINE_int64(steps, 5, "scaling: timed steps [steps]");
DEFINE_int64(warmup_steps, 2, "scaling: steps before them [steps]");
DEFINE_int64(model_hidden, 256, "scaling: hidden size of the model, unless --model is given");
DEFINE_int64(model_layers, 4, "scaling: its layers");
DEFINE_int64(model_heads, 4, "scaling: its query heads");
DEFINE_int64(model_kv_groups, 2, "scaling: its KV groups (key/value heads)");
DEFINE_int64(model_vocabulary, 4096, "scaling: its vocabulary [tokens]");

namespace drrl::bench {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

double ms_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double, std::milli>(end - begin).count();
}

/// --model's, or of the --model_ options. Its weights will be random: they change nothing about the
/// time of a step at a fixed rank.
ModelConfig model_config() {
  if (!FLAGS_model.empty()) {
    ModelConfig config = read_config();
    check_seq_len(config);
    return config;
  }
  check(ErrorKind::kUsage, FLAGS_seq_len >= 1, "--seq_len must be at least 1, got ", FLAGS_seq_len);
  check(ErrorKind::kUsage,
        FLAGS_model_heads >= 1 && FLAGS_model_hidden % FLAGS_model_heads == 0 &&
            FLAGS_model_hidden / FLAGS_model_heads % 2 == 0,
        "--model_hidden=", FLAGS_model_hidden,
        " must be an even multiple of --model_heads=", FLAGS_model_heads);
  const Json json = {{"model_type", "llama"},
                     {"vocab_size", FLAGS_model_vocabulary},
                     {"hidden_size", FLAGS_model_hidden},
                     {"intermediate_size", 3 * FLAGS_model_hidden},
                     {"num_hidden_layers", FLAGS_model_layers},
                     {"num_attention_heads", FLAGS_model_heads},
                     {"num_key_value_heads", FLAGS_model_kv_groups},
                     {"max_position_embeddings", FLAGS_seq_len},
                     {"tie_word_embeddings", true}};
  return ModelConfig::parse(json.dump(), "the --model_ options");
}

/// Random tokens, the same on all processes, in a file that is gone as soon as it is open.
std::shared_ptr<const TokenFile> random_tokens(int64_t count, int64_t vocabulary) {
  std::mt19937_64 random(FLAGS_seed);
  std::vector<int64_t> tokens(static_cast<size_t>(count));
  std::generate(tokens.begin(), tokens.end(),
                [&] { return static_cast<int64_t>(random() % static_cast<uint64_t>(vocabulary)); });
  const auto prefix = std::filesystem::temp_directory_path() / c10::str("drrl-scaling-", getpid());
  write_token_file(prefix, {tokens}, at::kInt);
  auto file = std::make_shared<const TokenFile>(TokenFile::open(prefix));
  for (const char* extension : {".bin", ".idx"}) {
    std::filesystem::remove(prefix.string() + extension);
  }
  return file;
}

/// A fixed amount of work, a product and a pass over memory of less than a millisecond, timed every
/// 50 ms while steps run: a core of a shared machine becomes slower and faster within tenths of a
/// second, each by itself, and a step's time means little without. Its thread runs on the cores
/// that the process is bound to (launch/bench/scaling.sh binds each process to one) and counts
/// processor time, in which no wait for the core is.
class Yardstick {
 public:
  Yardstick() : thread_([this] { run(); }) {}
  ~Yardstick() {
    stop_ = true;
    thread_.join();
  }
  Yardstick(const Yardstick&) = delete;
  Yardstick& operator=(const Yardstick&) = delete;

  /// What the work has taken since the last call [ms]: the harmonic mean of its times, which is
  /// that of a constant speed that would do as much.
  double take() {
    std::unique_lock lock(mutex_);
    measured_.wait(lock, [&] { return count_ > 0; });
    const double ms = static_cast<double>(count_) / speed_;
    count_ = 0;
    speed_ = 0;
    return ms;
  }

 private:
  static constexpr auto kEvery = std::chrono::milliseconds(50);

  void run() {
    const at::NoGradGuard no_grad;
    at::Tensor left = at::ones({64, 576}), right = at::ones({576, 768}),
               product = at::empty({64, 768}), memory = at::ones({int64_t{512} << 10});  // 2 MiB
    while (!stop_) {
      const double begin = cpu_ms(CLOCK_THREAD_CPUTIME_ID);
      at::mm_out(product, left, right);
      memory.neg_();
      const double ms = cpu_ms(CLOCK_THREAD_CPUTIME_ID) - begin;
      {
        const std::scoped_lock lock(mutex_);
        speed_ += 1 / ms;
        ++count_;
      }
      measured_.notify_one();
      std::this_thread::sleep_for(kEvery);
    }
  }

  std::mutex mutex_;
  std::condition_variable measured_;
  int64_t count_ = 0;  // since the last take()
  double speed_ = 0;   // sum of what was measured [1/ms]
  std::atomic<bool> stop_ = false;
  std::thread thread_;  // last: it uses all of the above
};

/// What one process sees of the timed steps.
class Recorder final : public StepObserver {
 public:
  Recorder(std::shared_ptr<Traffic> traffic, at::Device device)
      : traffic_(std::move(traffic)), device_(device) {
    if (device_.is_cpu()) {
      yardstick_.emplace();
    }
  }

  void begin_step(int64_t step) override {
    if (step <= FLAGS_warmup_steps) {
      return;
    }
    if (begun_.empty()) {
      traffic_->take();
      if (yardstick_) {
        yardstick_->take();  // of the steps before
      }
    } else {
      note_end();
    }
    begun_.push_back(Clock::now());
  }

  void end_step(AttentionStatistics& spent) override {
    if (!begun_.empty()) {
      spent_ += spent;
    }
  }

  /// After the last step.
  void finish() { note_end(); }

  std::vector<double> step_ms() const {
    std::vector<double> ms;
    for (size_t i = 0; i < begun_.size(); ++i) {
      ms.push_back(ms_between(begun_[i], ended_[i]));
    }
    return ms;
  }

  /// Of each step: what the yardstick took meanwhile; empty on CUDA.
  const std::vector<double>& yardstick_ms() const { return yardsticks_; }

  /// All figures are those of one step, on average; shares are of the time of all.
  Json report(const Mesh& mesh) const {
    const auto steps = static_cast<double>(FLAGS_steps);
    const auto on_cpu = [&](double ms) {
      return device_.is_cpu() ? Json(ms) : Json();
    };  // on CUDA the host runs ahead, and its times say nothing
    const std::vector<double> ms = step_ms();
    const double all_ms = std::accumulate(ms.begin(), ms.end(), 0.0);
    const Json sent = traffic_report(traffic_->take(), steps, device_.is_cpu());
    const Json& exposed_ms = sent["exposed_ms"];
    Json report = {
        {"rank", mesh.world().rank()},
        {"tp_rank", mesh.tp().rank()},
        {"cp_rank", mesh.cp().rank()},
        {"dp_rank", mesh.dp().rank()},
        {"step_ms", median(ms)},
        {"exposed_share",
         exposed_ms.is_null() ? Json() : Json(exposed_ms.get<double>() * steps / all_ms)},
        {"basis_ms", on_cpu(spent_.basis_ms / steps)},
        {"basis_cpu_ms", on_cpu(spent_.basis_cpu_ms / steps)},
        {"basis_share", on_cpu(spent_.basis_ms / all_ms)},
        {"basis_bytes", static_cast<double>(spent_.basis_bytes) / steps},
        {"attention_forward_ms", on_cpu(spent_.attention_ms / steps)}};
    report.update(sent);
    return report;
  }

 private:
  void note_end() {
    ended_.push_back(Clock::now());
    if (yardstick_) {
      yardsticks_.push_back(yardstick_->take());
    }
  }

  std::shared_ptr<Traffic> traffic_;
  at::Device device_;
  std::optional<Yardstick> yardstick_;
  std::vector<Clock::time_point> begun_, ended_;  // of the timed steps
  std::vector<double> yardsticks_;                // during each
  AttentionStatistics spent_;
};

Json mean(const Json& ranks, const char* key) {
  double sum = 0;
  for (const Json& rank : ranks) {
    if (rank[key].is_null()) {
      return nullptr;
    }
    sum += rank[key].get<double>();
  }
  return sum / static_cast<double>(ranks.size());
}

std::string cell(const Json& value, const char* pattern, double factor = 1) {
  return value.is_null() ? "-" : format(pattern, value.get<double>() * factor);
}

void print_results(const Json& result) {
  std::vector<std::vector<std::string>> table = {{"rank", "tp", "cp", "dp", "step ms", "exposed ms",
                                                  "exposed", "bases ms", "bases", "sent MB"}};
  for (const Json& rank : result["ranks"]) {
    table.push_back({rank["rank"].dump(), rank["tp_rank"].dump(), rank["cp_rank"].dump(),
                     rank["dp_rank"].dump(), cell(rank["step_ms"], "%.1f"),
                     cell(rank["exposed_ms"], "%.2f"), cell(rank["exposed_share"], "%.1f %%", 100),
                     cell(rank["basis_ms"], "%.2f"), cell(rank["basis_share"], "%.1f %%", 100),
                     cell(rank["sent_bytes"], "%.3f", 1e-6)});
  }
  std::cout << "\na step of each process: exposed: held by collectives, waiting for slower "
               "processes included; bases: Grams and bases of the forward "
               "pass; sent: at best, see launch/OPTIONS.md\n";
  print_table(std::cout, table);
  std::cout << "\nstep " << cell(result["step_ms"], "%.1f") << " ms (median, the slowest process), "
            << cell(result["steps_per_second"], "%.3f") << " steps/s, "
            << cell(result["tokens_per_second"], "%.0f") << " tokens/s\n";
}

void check_options(const MeshShape& shape) {
  check(ErrorKind::kUsage, FLAGS_scaling == "weak" || FLAGS_scaling == "strong",
        "--scaling must be weak or strong, got '", FLAGS_scaling, "'");
  check(ErrorKind::kUsage, FLAGS_steps >= 1 && FLAGS_warmup_steps >= 1,
        "--steps and --warmup_steps must be at least 1, got ", FLAGS_steps, " and ",
        FLAGS_warmup_steps);
  check(ErrorKind::kUsage, FLAGS_sequences >= 1, "--sequences must be at least 1, got ",
        FLAGS_sequences);
  check(ErrorKind::kUsage, FLAGS_scaling == "weak" || FLAGS_sequences >= shape.dp,
        "--sequences=", FLAGS_sequences, " in all (--scaling=strong) cannot be dealt out to ",
        shape.dp, " data-parallel processes");
  check(ErrorKind::kUsage, FLAGS_attention == "exact" || FLAGS_rank_policy == "fixed",
        "drrl-bench scaling has random weights, for which only "
        "--rank_policy=fixed makes sense, got ",
        FLAGS_rank_policy);
}

void print_start(const Environment& environment, const MeshShape& shape, const CausalLM& model,
                 const std::string& attention, int64_t sequences) {
  const ModelConfig& config = model.config();
  print_banner(
      std::cout, "drrl-bench scaling",
      {{"model", c10::str(short_count(static_cast<double>(model.parameter_count())),
                          " random weights: ", config.num_hidden_layers, " layers, hidden ",
                          config.hidden_size, ", ", config.num_attention_heads, " heads of ",
                          config.head_dim, " in ", config.num_key_value_heads,
                          " KV groups, vocabulary ", config.vocab_size)},
       {"parallel",
        c10::str("tensor ", shape.tp, " x data ", shape.dp, " x context ", shape.cp, " = ",
                 environment.world_size, " processes (", name(environment.launcher), "), ",
                 at::get_num_threads(), " CPU threads each")},
       {"attention", attention},
       {"batch", c10::str(FLAGS_scaling, " scaling: ", sequences, " sequences of ", FLAGS_seq_len,
                          " tokens per step")},
       {"versions", version_line()}});
}

// By element the largest that a process has.
std::vector<double> largest(const std::vector<double>& own, const Group& group) {
  at::Tensor all = at::tensor(own, at::kDouble).to(group.message_device());
  group.all_reduce(all, ReduceOp::kMax);
  all = all.cpu();
  return {all.data_ptr<double>(), all.data_ptr<double>() + all.numel()};
}

// Collective: times of the slowest process, figures of all.
Json results(const Environment& environment, const MeshShape& shape, const Mesh& mesh,
             const CausalLM& model, const std::string& attention, int64_t sequences,
             const Recorder& recorder) {
  const bool on_cpu = model.options().device.is_cpu();
  const Json ranks = gathered(recorder.report(mesh), mesh.world());
  const std::vector<double> steps_ms = largest(recorder.step_ms(), mesh.world()),
                            yardsticks_ms = on_cpu ? largest(recorder.yardstick_ms(), mesh.world())
                                                   : std::vector<double>();
  const double step_ms = median(steps_ms);
  const int64_t step_tokens = sequences * FLAGS_seq_len;
  Json steps = Json::array();
  for (size_t i = 0; i < steps_ms.size(); ++i) {
    steps.push_back(
        {{"ms", steps_ms[i]}, {"yardstick_ms", on_cpu ? Json(yardsticks_ms[i]) : Json()}});
  }
  Json json = provenance("scaling");
  json.update(Json{{"launcher", name(environment.launcher)},
                   {"world_size", environment.world_size},
                   {"processes_per_node", environment.local_size},
                   {"cores_per_node", std::thread::hardware_concurrency()},
                   {"tp", shape.tp},
                   {"cp", shape.cp},
                   {"dp", shape.dp},
                   {"scaling", FLAGS_scaling},
                   {"attention", attention},
                   {"config", Json::parse(model.config().export_json(at::kFloat))},
                   {"parameters", model.parameter_count()},
                   {"sequences_per_step", sequences},
                   {"tokens_per_step", step_tokens},
                   {"timed_steps", FLAGS_steps},
                   {"steps", steps},
                   {"step_ms", step_ms},
                   {"steps_per_second", 1e3 / step_ms},
                   {"tokens_per_second", 1e3 / step_ms * static_cast<double>(step_tokens)},
                   {"exposed_share", mean(ranks, "exposed_share")},
                   {"basis_share", mean(ranks, "basis_share")},
                   {"basis_bytes", mean(ranks, "basis_bytes")},
                   {"sent_bytes", mean(ranks, "sent_bytes")},
                   {"ranks", ranks}});
  return json;
}

}  // namespace

ExitCode scaling(const Environment& environment) {
  MeshShape shape = mesh_flags(environment);
  check_options(shape);
  const at::Device device = device_flag(environment);
  const ModelOptions model_options{.dtype = dtype_flag("dtype", FLAGS_dtype), .device = device};
  const ModelConfig config = model_config();
  shape.kv_heads = config.num_key_value_heads;
  TrainerOptions options;
  options.global_batch = FLAGS_scaling == "weak" ? FLAGS_sequences * environment.world_size
                                                 : FLAGS_sequences;
  options.steps = FLAGS_warmup_steps + FLAGS_steps;
  const int64_t step_tokens = options.global_batch * FLAGS_seq_len;
  options.schedule = {
      .lr = 1e-4, .min_lr = 1e-4, .warmup_tokens = 0, .total_tokens = options.steps * step_tokens};
  const auto tokens = random_tokens(16 * FLAGS_seq_len + 1, config.vocab_size);
  const auto data = std::make_shared<SequenceDataset>(tokens, 0, tokens->tokens(), FLAGS_seq_len,
                                                      FLAGS_seed);

  agree_on_inputs(environment, attention_inputs({"config"}));
  Mesh mesh = create_mesh(environment, shape, device);
  const auto traffic = std::make_shared<Traffic>();
  mesh.count(traffic);
  guarded(environment, [&] {
    const bool leader = environment.world_rank == 0;
    const AttentionSetup attention = attention_flags(config, mesh, device);
    attention.controller->set_timing(device.is_cpu());  // on CUDA it would hold up the steps
    CausalLM model(config, mesh.tp(), attention.controller, model_options);
    model.initialize(FLAGS_seed);
    const std::string description = attention.controller->describe();
    if (leader) {
      print_start(environment, shape, model, description, options.global_batch);
    }
    const auto recorder = std::make_shared<Recorder>(traffic, device);
    StepObservers observers = attention.observers;
    observers.push_back(recorder);
    Trainer trainer(options, model, mesh, data, nullptr, observers);
    trainer.run();
    synchronize(device);
    recorder->finish();
    const Json json = results(environment, shape, mesh, model, description, options.global_batch,
                              *recorder);
    if (leader) {
      print_results(json);
      if (!FLAGS_json.empty()) {
        write_measured(FLAGS_json, json);
      }
    }
    mesh.world().barrier();
  });
  return ExitCode::kSuccess;
}

}  // namespace drrl::bench
