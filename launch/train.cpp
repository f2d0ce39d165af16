// drrl-train: fine-tunes a Hugging Face language model, alone or under mpirun. Options: drrl-train
// --help, launch/OPTIONS.md.

#include <cmath>
#include <iostream>
#include <set>

#include <ATen/Parallel.h>
#include <gflags/gflags.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/io/file_io.h"
#include "distributed/topology/mesh.h"
#include "launch/options/balance_flags.h"
#include "launch/options/flags.h"
#include "launch/options/online_flags.h"
#include "launch/options/options.h"
#include "launch/options/policy_flags.h"
#include "launch/runtime/agreement.h"
#include "launch/runtime/attention_clock.h"
#include "launch/runtime/console.h"
#include "launch/runtime/log.h"
#include "launch/runtime/program.h"
#include "launch/runtime/traffic_report.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/config.h"
#include "models/causal_lm/replicas.h"
#include "models/data/sequence_dataset.h"
#include "models/data/token_file.h"
#include "models/training/trainer.h"

DEFINE_string(
    output, "",
    "folder for checkpoints/, metrics/ and hf/ (the trained model); empty: nothing is written");
DEFINE_string(valid_data, "",
              "token file for validation; empty: the last --valid_fraction of --data");
DEFINE_double(valid_fraction, 0.05,
              "tail of --data that is held out from training when there is no --valid_data; 0: no "
              "validation [of tokens]");
DEFINE_int64(micro_batch, 1, "sequences in one forward and backward pass of a process [sequences]");
DEFINE_int64(global_batch, 8, "sequences in one update, over all processes [sequences]");
DEFINE_int64(steps, 0, "updates of the whole run; 0: as --train_tokens says [steps]");
DEFINE_int64(train_tokens, 0,
             "length of the whole run, in place of --steps; both 0: one pass over the training "
             "data [tokens]");
DEFINE_double(lr, 1e-4, "peak learning rate");
DEFINE_double(min_lr, 1e-5, "learning rate at the end of the cosine");
DEFINE_int64(warmup_tokens, -1, "linear warm-up; -1: a twentieth of the run [tokens]");
DEFINE_double(weight_decay, 0.1, "decoupled weight decay of matrices");
DEFINE_double(beta1, 0.9, "AdamW: decay of the first moment");
DEFINE_double(beta2, 0.95, "AdamW: decay of the second moment");
DEFINE_double(eps, 1e-8, "AdamW: added to the root of the second moment");
DEFINE_double(clip, 1.0, "largest global gradient norm; 0: no clipping");
DEFINE_bool(activation_checkpoint, false,
            "keep only each layer's input and recompute the rest in the backward pass");
DEFINE_int64(save_every, 0,
             "steps between checkpoints; 0: only at the end and on SIGTERM, SIGINT, SIGHUP and "
             "SIGUSR1 [steps]");
DEFINE_int64(keep, 2, "newest checkpoints to keep; 0: all");
DEFINE_bool(resume, false,
            "continue from the newest sound checkpoint in --output, or start if there is none");
DEFINE_bool(resume_override, false, "resume although options that shape the run have changed");
DEFINE_int64(balance_every, 0,
             "under dp and --tp, make up for slower tensor-parallel processes so often: by "
             "measured speeds, smaller ranks for them and larger ones for those that would "
             "wait; measured anew after --resume; 0: never [steps]");
DEFINE_int64(log_every, 1, "steps between logged lines [steps]");
DEFINE_int64(eval_every, 0, "steps between validations; 0: only before and after training [steps]");
DEFINE_int64(
    eval_tokens, 16384,
    "length of one validation, from the start of the validation data; 0: all of it [tokens]");
DEFINE_string(export_dtype, "fp32", "precision of the exported model: fp32 or bf16");

namespace drrl {
namespace {

struct Data {
  std::shared_ptr<const SequenceDataset> train, valid;
};

Data open_data(const Environment& environment, const ModelConfig& config) {
  check(ErrorKind::kUsage, FLAGS_valid_fraction >= 0 && FLAGS_valid_fraction < 1,
        "--valid_fraction must lie in [0, 1), got ", FLAGS_valid_fraction);
  const auto file = open_token_file(FLAGS_data, config, environment);
  Data data;
  int64_t train_end = file->tokens();
  if (!FLAGS_valid_data.empty()) {
    const auto valid = open_token_file(FLAGS_valid_data, config, environment);
    data.valid = std::make_shared<SequenceDataset>(valid, 0, valid->tokens(), FLAGS_seq_len,
                                                   FLAGS_seed);
  } else if (FLAGS_valid_fraction > 0) {
    const auto held_out = static_cast<int64_t>(
        std::llround(FLAGS_valid_fraction * static_cast<double>(file->tokens())));
    train_end -= held_out;
    if (held_out > FLAGS_seq_len) {
      data.valid = std::make_shared<SequenceDataset>(file, train_end, file->tokens(), FLAGS_seq_len,
                                                     FLAGS_seed);
    } else if (environment.world_rank == 0) {
      log_warning(c10::str("no validation: --valid_fraction=", FLAGS_valid_fraction, " of ",
                           file->tokens(),
                           " tokens is not more than one "
                           "sequence of ",
                           FLAGS_seq_len));
    }
  }
  data.train = std::make_shared<SequenceDataset>(file, 0, train_end, FLAGS_seq_len, FLAGS_seed);
  return data;
}

int64_t planned_steps(const SequenceDataset& train) {
  check(ErrorKind::kUsage, FLAGS_global_batch >= 1, "--global_batch must be at least 1, got ",
        FLAGS_global_batch);
  check(ErrorKind::kUsage, FLAGS_steps >= 0 && FLAGS_train_tokens >= 0,
        "--steps and --train_tokens must not be negative, got ", FLAGS_steps, " and ",
        FLAGS_train_tokens);
  check(ErrorKind::kUsage, FLAGS_steps == 0 || FLAGS_train_tokens == 0, "--steps=", FLAGS_steps,
        " and --train_tokens=", FLAGS_train_tokens, " cannot both be given");
  if (FLAGS_steps > 0) {
    return FLAGS_steps;
  }
  const int64_t step_tokens = FLAGS_global_batch * FLAGS_seq_len;
  const int64_t tokens = FLAGS_train_tokens > 0 ? FLAGS_train_tokens
                                                : train.windows() * FLAGS_seq_len;
  return std::max<int64_t>(1, (tokens + step_tokens - 1) / step_tokens);
}

/// The options that decide what the run computes; paths, logging, saving and layout do not.
std::map<std::string, std::string> fingerprint(const SequenceDataset& train, int64_t steps) {
  static const std::set<std::string> free = {"model",
                                             "data",
                                             "valid_data",
                                             "output",
                                             "device",
                                             "threads",
                                             "timeout_s",
                                             "watchdog_timeout_s",
                                             "json",
                                             "save_every",
                                             "keep",
                                             "resume",
                                             "resume_override",
                                             "log_every",
                                             "eval_every",
                                             "eval_tokens",
                                             "tp",
                                             "cp",
                                             "dp",
                                             "export_dtype",
                                             "steps",
                                             "train_tokens",
                                             "policy",
                                             "activation_checkpoint"};
  std::map<std::string, std::string> values;
  for (const Option& option : options()) {
    if (!free.contains(option.name)) {
      values[option.name] = option.value;
    }
  }
  values["steps"] = std::to_string(steps);
  values["training tokens"] = std::to_string(train.end() - train.begin());
  return values;
}

TrainerOptions trainer_options(const SequenceDataset& train) {
  TrainerOptions options;
  options.micro_batch = FLAGS_micro_batch;
  options.global_batch = FLAGS_global_batch;
  options.steps = planned_steps(train);
  options.clip = FLAGS_clip;
  const int64_t total = options.steps * FLAGS_global_batch * FLAGS_seq_len;
  check(ErrorKind::kUsage, FLAGS_warmup_tokens >= -1 && FLAGS_warmup_tokens < total,
        "--warmup_tokens=", FLAGS_warmup_tokens, " must lie in [0, ", total,
        "), the tokens of the run, or be -1, a twentieth of them");
  options.schedule = {FLAGS_lr, FLAGS_min_lr,
                      FLAGS_warmup_tokens >= 0 ? FLAGS_warmup_tokens : total / 20, total};
  options.optimizer = {FLAGS_beta1, FLAGS_beta2, FLAGS_eps, FLAGS_weight_decay};
  options.output = FLAGS_output;
  options.save_every = FLAGS_save_every;
  options.keep = FLAGS_keep;
  options.log_every = FLAGS_log_every;
  options.eval_every = FLAGS_eval_every;
  options.eval_tokens = FLAGS_eval_tokens;
  options.resume = FLAGS_resume;
  options.resume_override = FLAGS_resume_override;
  options.fingerprint = fingerprint(train, options.steps);
  return options;
}

void print_start(const Environment& environment, const MeshShape& shape, const ModelConfig& config,
                 const CausalLM& model, const std::string& attention, const Data& data,
                 const TrainerOptions& options) {
  int64_t local = 0;
  for (const Parameter& parameter : model.parameters()) {
    local += parameter.value.numel();
  }
  const int64_t step_tokens = options.global_batch * FLAGS_seq_len;
  const auto per_rank = (options.global_batch + shape.dp - 1) / shape.dp;
  std::vector<std::pair<std::string, std::string>> lines = {
      {"device", c10::str(FLAGS_device, ", ", at::get_num_threads(), " CPU threads per process")},
      {"precision", FLAGS_dtype + " activations, fp32 weights and moments"},
      {"model",
       c10::str(FLAGS_model, ": ", name(config.architecture), ", ", config.num_hidden_layers,
                " layers, hidden ", config.hidden_size, ", ", config.num_attention_heads,
                " heads of ", config.head_dim, " in ", config.num_key_value_heads, " KV groups")},
      {"parameters", c10::str(short_count(static_cast<double>(model.parameter_count())), ", ",
                              short_count(static_cast<double>(local)), " on this process")},
      {"parallel",
       c10::str("tensor ", shape.tp, " x data ", shape.dp, " x context ", shape.cp, " = ",
                environment.world_size, " processes (", name(environment.launcher), ")")},
      {"attention", attention},
      {"batch",
       c10::str(options.global_batch, " sequences of ", FLAGS_seq_len, " = ", step_tokens,
                " tokens per step; up to ", per_rank,
                " sequences per data-parallel process in microbatches of ", options.micro_batch)},
      {"training data", c10::str(FLAGS_data, ": ", data.train->end() - data.train->begin(),
                                 " tokens, ", data.train->windows(), " sequences")},
      {"validation", data.valid ? c10::str(FLAGS_valid_data.empty() ? FLAGS_data : FLAGS_valid_data,
                                           ": ", data.valid->end() - data.valid->begin(),
                                           " tokens from ", data.valid->begin())
                                : "none"},
      {"run", c10::str(options.steps, " steps, ",
                       short_count(static_cast<double>(options.schedule.total_tokens)),
                       " tokens, warm-up ", options.schedule.warmup_tokens)},
      {"versions", version_line()},
  };
  print_banner(std::cout, "drrl-train", lines);
  for (const std::string& warning : config.warnings) {
    log_warning(warning);
  }
}

nlohmann::ordered_json summary_json(const TrainResult& result, const TrainerOptions& options,
                                    const Environment& environment, const MeshShape& shape,
                                    const OnlineBalance* balance, const AttentionClock* clock,
                                    const nlohmann::ordered_json& ranks) {
  nlohmann::ordered_json json;
  const auto put = [&](const char* key, double value) {
    if (std::isfinite(value)) {
      json[key] = value;
    }
  };
  json["interrupted"] = result.interrupted;
  json["steps"] = result.steps;
  json["tokens"] = result.tokens;
  put("first_loss", result.first_loss);
  put("last_loss", result.last_loss);
  put("valid_loss_before", result.valid_loss_before);
  put("valid_loss_after", result.valid_loss_after);
  put("valid_ppl_before", std::exp(result.valid_loss_before));
  put("valid_ppl_after", std::exp(result.valid_loss_after));
  put("step_seconds", result.step_seconds);
  if (clock != nullptr) {
    json["attention_seconds"] = clock->seconds();
  }
  put("tokens_per_second",
      static_cast<double>(result.steps_this_run * options.global_batch * FLAGS_seq_len) /
          result.step_seconds);
  json["device"] = FLAGS_device;
  json["dtype"] = FLAGS_dtype;
  json["threads"] = at::get_num_threads();
  json["world_size"] = environment.world_size;
  json["tp"] = shape.tp;
  json["dp"] = shape.dp;
  json["cp"] = shape.cp;
  if (balance != nullptr) {
    json["balance_speeds"] = balance->speeds();
  }
  json["ranks"] = ranks;
  json["checkpoint"] = result.checkpoint.string();
  json["versions"] = version_line();
  for (const Option& option : drrl::options()) {
    json["options"][option.name] = option.value;
  }
  return json;
}

void print_summary(const TrainResult& result, const TrainerOptions& options) {
  std::cout << (result.interrupted ? "interrupted after step " : "finished at step ")
            << result.steps << " (" << result.tokens << " tokens)"
            << (result.interrupted && !options.output.empty() ? ", saved: --resume goes on" : "");
  if (result.steps_this_run > 0) {
    std::cout << ": loss " << result.first_loss << " -> " << result.last_loss << " in "
              << clock_time(result.step_seconds) << ", "
              << static_cast<int64_t>(static_cast<double>(result.steps_this_run *
                                                          options.global_batch * FLAGS_seq_len) /
                                      result.step_seconds)
              << " tokens/s";
  }
  std::cout << "\n";
  if (std::isfinite(result.valid_loss_after)) {
    std::cout << "validation perplexity " << std::exp(result.valid_loss_before) << " -> "
              << std::exp(result.valid_loss_after) << "\n";
  }
  std::cout << std::flush;
}

/// World rank 0, before any work: whatever the run writes can be written, and no other run writes
/// there. Holds --output from then on.
std::unique_ptr<FolderLock> claim_outputs(const Environment& environment) {
  if (environment.world_rank != 0) {
    return nullptr;
  }
  if (FLAGS_output.empty()) {
    check_outputs(environment, {"json"});
    log_warning(
        "no --output: NOTHING OF THIS TRAINING WILL BE KEPT, neither the model nor checkpoints; "
        "give --output=FOLDER unless only the speed is of interest");
    return nullptr;
  }
  std::unique_ptr<FolderLock> lock;
  naming("output", FLAGS_output, [&] {
    const std::filesystem::path output = FLAGS_output;
    for (const char* folder : {"checkpoints", "metrics", "hf"}) {
      check_writable_folder(output / folder);
    }
    for (const char* file : {"checkpoints/latest", "metrics/metrics.jsonl", "metrics/metrics.csv",
                             "hf/config.json", "hf/model.safetensors", "policy.safetensors"}) {
      std::error_code unknown;
      const auto status = std::filesystem::symlink_status(output / file, unknown);
      const bool replaced = std::filesystem::is_symlink(status) &&
                            std::string_view(file) == "checkpoints/latest";  // whatever it leads to
      if (std::filesystem::exists(status) && !replaced) {
        check_writable(output / file);
      }
    }
    lock = std::make_unique<FolderLock>(output, "--output",
                                        [](const std::string& text) { log_warning(text); });
  });
  check_outputs(environment, {"json"});  // perhaps in --output
  return lock;
}

/// Bytes of Grams and bases that this process sent in all steps.
struct BasisBytes final : StepObserver {
  void end_step(AttentionStatistics& spent) override { sum += spent.basis_bytes; }

  int64_t sum = 0;
};

TrainerCallbacks callbacks_of(TrainConsole& console) {
  TrainerCallbacks callbacks;
  callbacks.on_step = [&console](const StepReport& report) { console.step(report); };
  callbacks.on_microbatch = [&console](int64_t step, int64_t done, int64_t total) {
    console.microbatch(step, done, total);
  };
  callbacks.on_note = [&console](const std::string& text) { console.note(text); };
  callbacks.on_warning = [](const std::string& text) { log_warning(text); };
  callbacks.stop_requested = &stop_requested;
  return callbacks;
}

/// Writes the model, and the policy file that online training has made, into --output.
void export_results(const Mesh& mesh, CausalLM& model, at::ScalarType dtype,
                    const OnlinePolicy* online) {
  const std::filesystem::path output = FLAGS_output;
  if (mesh.data().rank() == 0) {
    model.save(output / "hf", dtype);
  }
  if (mesh.world().rank() == 0) {
    if (online != nullptr) {
      save_online_policy(*online, output / "policy.safetensors");
    }
    std::cout << "exported " << FLAGS_output << "/hf"
              << (online != nullptr ? " and policy.safetensors" : "") << std::endl;
  }
}

ExitCode train(const Environment& environment) {
  require("model", FLAGS_model);
  require("data", FLAGS_data);
  MeshShape shape = mesh_flags(environment);
  check(ErrorKind::kUsage, FLAGS_balance_every >= 0, "--balance_every must not be negative, got ",
        FLAGS_balance_every);
  const at::Device device = device_flag(environment);
  const ModelOptions model_options{.dtype = dtype_flag("dtype", FLAGS_dtype),
                                   .device = device,
                                   .activation_checkpoint = FLAGS_activation_checkpoint};
  const at::ScalarType export_dtype = dtype_flag("export_dtype", FLAGS_export_dtype);
  const ModelConfig config = read_model_config();
  shape.kv_heads = config.num_key_value_heads;
  check_seq_len(config);
  const Data data = open_data(environment, config);
  const TrainerOptions options = trainer_options(*data.train);
  const auto claimed = claim_outputs(environment);

  agree_on_inputs(environment, attention_inputs({"model", "data", "valid_data"}));
  Mesh mesh = create_mesh(environment, shape, device);
  const auto traffic = std::make_shared<Traffic>();
  mesh.count(traffic);
  std::unique_ptr<CausalLM> model;
  std::unique_ptr<Trainer> trainer;
  ExitCode code = ExitCode::kSuccess;
  guarded(environment, [&] {
    const bool leader = environment.world_rank == 0;
    at::manual_seed(FLAGS_seed * 1000003 + static_cast<uint64_t>(environment.world_rank));
    AttentionSetup attention = attention_flags(config, mesh, device);
    const auto online = online_policy_flags(environment, config, mesh, device,
                                            FLAGS_global_batch * FLAGS_seq_len, attention);
    const auto balance = online_balance(FLAGS_balance_every, config, mesh, device, attention);
    const auto clock = device.is_cpu() ? std::make_shared<AttentionClock>(attention.controller)
                                       : nullptr;  // a GPU's work goes on after the call
    model = std::make_unique<CausalLM>(
        config, mesh.tp(),
        clock ? clock : std::shared_ptr<AttentionController>(attention.controller), model_options);
    load_weights(*model, mesh.world());
    if (!FLAGS_output.empty() && mesh.data().rank() == 0) {
      model->open_companions();
    }
    check_replicas(*model, mesh);
    if (leader) {
      print_start(environment, shape, config, *model, attention.controller->describe(), data,
                  options);
    }
    const auto basis_bytes = std::make_shared<BasisBytes>();
    attention.observers.push_back(basis_bytes);
    TrainConsole console(std::cout, leader && stdout_is_terminal(environment), options.steps);
    const TrainerCallbacks callbacks = callbacks_of(console);
    trainer = std::make_unique<Trainer>(options, *model, mesh, data.train, data.valid,
                                        attention.observers, callbacks);
    traffic->take();  // that of the start
    const TrainResult result = trainer->run();
    const auto sent = traffic->take();

    if (leader) {
      print_summary(result, options);
    }
    const auto watched = watch(watchdog(), "export");
    if (online) {
      online->finish();
    }
    if (!result.interrupted && !FLAGS_output.empty()) {
      export_results(mesh, *model, export_dtype, online.get());
    }
    if (!FLAGS_json.empty()) {
      const double steps = std::max<double>(1, static_cast<double>(result.steps_this_run));
      nlohmann::ordered_json own = {{"rank", environment.world_rank},
                                    {"basis_bytes", static_cast<double>(basis_bytes->sum) / steps}};
      own.update(traffic_report(sent, steps, device.is_cpu()));
      const auto ranks = gathered(own, mesh.world());
      if (leader) {
        write_text(FLAGS_json, summary_json(result, options, environment, shape, balance.get(),
                                            clock.get(), ranks)
                                       .dump(2) +
                                   "\n");
      }
    }
    mesh.world().barrier();
    code = result.interrupted ? ExitCode::kInterrupted : ExitCode::kSuccess;
  });
  return code;
}

}  // namespace
}  // namespace drrl

int main(int argc, char** argv) {
  drrl::watch_stop_signals();
  return drrl::run_program(
      argc, argv, "drrl-train",
      "drrl-train: fine-tunes a Hugging Face language model, alone or under mpirun.", &drrl::train);
}
