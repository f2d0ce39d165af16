// drrl-eval: perplexity of a language model under a rank policy, or its accuracy on examples, and
// what its attention cost; or text that it generates. Options: drrl-eval --help.

#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <gflags/gflags.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/io/file_io.h"
#include "distributed/topology/mesh.h"
#include "launch/eval/answers.h"
#include "launch/eval/audit_report.h"
#include "launch/eval/decisions.h"
#include "launch/eval/generation.h"
#include "launch/eval/perplexity.h"
#include "launch/options/balance_flags.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/options/policy_flags.h"
#include "launch/runtime/agreement.h"
#include "launch/runtime/console.h"
#include "launch/runtime/log.h"
#include "launch/runtime/program.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/config.h"
#include "models/causal_lm/replicas.h"
#include "models/causal_lm/tokenizer.h"
#include "models/data/examples.h"
#include "models/data/sequence_dataset.h"
#include "models/data/token_file.h"
#include "policy/attention/audit.h"
#include "policy/attention/lowrank_controller.h"

DEFINE_string(balance_speeds, "",
              "evaluate the ranks that balance chooses for tensor-parallel processes of these "
              "speeds, e.g. 1,0.5, whatever --tp is (drrl-train --balance_every); "
              "empty: those of --rank_budget");
DEFINE_int64(audit_rows, 0,
             "compare certified error bounds with exact attention for this many query tokens of "
             "each block, in one process; 0: no audit [tokens]");
DEFINE_string(decisions, "",
              "file for the ranks of every far pair and the share of entries that gates made "
              "exact, a JSON object for each sequence and layer, from one process");
DEFINE_string(ablate, "",
              "leave out, for a study: residual (of far log-sum-exps), mass (weights of keys and "
              "values in Grams), or both with a comma between");
DEFINE_string(examples, "",
              "instead of evaluating --data, answer the questions of this file, a text with one or "
              "more a line, in JSON; launch/prepare/downstream_sets.py writes such files");
DEFINE_string(examples_out, "",
              "file for what became of each question of --examples, a JSON object a line");
DECLARE_int64(max_tokens);
DECLARE_bool(compare_exact);
DECLARE_int64(generate);
DECLARE_int64(prompt_tokens);

namespace drrl {
namespace {

using Json = nlohmann::ordered_json;

/// --ablate. Errors: Error(kUsage).
Ablation ablation_flag() {
  Ablation ablation;
  for (const std::string& part : split(FLAGS_ablate, ',')) {
    check(ErrorKind::kUsage, part == "residual" || part == "mass", "--ablate=", FLAGS_ablate,
          ": expected residual, mass or both, got '", part, "'");
    (part == "residual" ? ablation.residual : ablation.mass) = true;
  }
  check(ErrorKind::kUsage, FLAGS_ablate.empty() || FLAGS_attention == "lowrank",
        "--ablate=", FLAGS_ablate, " needs --attention=lowrank, got ", FLAGS_attention);
  return ablation;
}

/// Errors: Error(kUsage) for options that do not go together.
void check_options(const Environment& environment) {
  require("model", FLAGS_model);
  const bool answering = !FLAGS_examples.empty();
  if (!answering) {
    require("data", FLAGS_data);
  }
  check(ErrorKind::kUsage, answering || FLAGS_examples_out.empty(),
        "--examples_out=", FLAGS_examples_out, " needs --examples");
  check(ErrorKind::kUsage,
        !answering || (FLAGS_data.empty() && FLAGS_generate == 0 && FLAGS_audit_rows == 0 &&
                       !FLAGS_compare_exact),
        "--examples=", FLAGS_examples,
        " goes neither with --data, in whose place it stands, nor with --generate, --audit_rows or "
        "--compare_exact");
  check(ErrorKind::kUsage, FLAGS_max_tokens >= 0, "--max_tokens must not be negative, got ",
        FLAGS_max_tokens);
  check(ErrorKind::kUsage, FLAGS_generate >= 0, "--generate must not be negative, got ",
        FLAGS_generate);
  check(ErrorKind::kUsage, FLAGS_audit_rows >= 0, "--audit_rows must not be negative, got ",
        FLAGS_audit_rows);
  check(ErrorKind::kUsage,
        FLAGS_audit_rows == 0 ||
            (FLAGS_attention == "lowrank" && FLAGS_dtype == "fp32" && FLAGS_generate == 0),
        "--audit_rows needs --attention=lowrank and --dtype=fp32, and does not go with --generate");
  check(ErrorKind::kUsage, !FLAGS_gates || FLAGS_generate == 0,
        "--gates does not go with --generate, whose cache holds no exact far keys");
  check(ErrorKind::kUsage, FLAGS_drop == 0 || FLAGS_generate == 0,
        "--drop does not go with --generate, whose tokens come one by one");
  check(ErrorKind::kUsage, FLAGS_drop == 0 || FLAGS_audit_rows == 0,
        "--drop does not go with --audit_rows, whose bounds know no dropped tiles yet");
  check(ErrorKind::kUsage, FLAGS_audit_rows == 0 || !FLAGS_compare_exact,
        "--audit_rows does not go with --compare_exact, whose times it would disturb");
  check(ErrorKind::kUsage, FLAGS_audit_rows == 0 || environment.world_size == 1,
        "--audit_rows runs in one process, this job has ", environment.world_size);
  check(
      ErrorKind::kUsage,
      FLAGS_decisions.empty() || (environment.world_size == 1 && !answering && FLAGS_generate == 0),
      "--decisions=", FLAGS_decisions,
      " goes with an evaluation of --data in one process, this job has ", environment.world_size);
  check(ErrorKind::kUsage, FLAGS_balance_speeds.empty() || (!answering && FLAGS_generate == 0),
        "--balance_speeds chooses ranks for sequences of --seq_len, it goes "
        "neither with --examples nor with --generate");
}

/// What is evaluated: the questions of --examples, or --data.
struct Inputs {
  std::shared_ptr<const TokenFile> file;  ///< null: examples
  std::vector<Example> examples;
  std::optional<SequenceDataset> data;  ///< none: examples, or a text to continue
  int64_t windows = 0;                  ///< sequences of the data

  std::string describe() const {
    return file == nullptr ? c10::str(FLAGS_examples, ": ", examples.size(), " examples")
           : data          ? c10::str(FLAGS_data, ": ", windows, " sequences of ", FLAGS_seq_len)
                           : c10::str(FLAGS_data, ": the first ", FLAGS_prompt_tokens, " tokens");
  }
};

Inputs read_inputs(const ModelConfig& config, const MeshShape& shape,
                   const Environment& environment) {
  Inputs inputs;
  if (!FLAGS_examples.empty()) {
    check(ErrorKind::kUsage, shape.cp == 1, "--examples does not go with --cp=", shape.cp,
          ", expected 1");
    const auto watched = watch(watchdog(), "reading examples");
    inputs.examples = read_examples(FLAGS_examples, config);
    if (environment.world_rank == 0) {
      check_tokenizer(FLAGS_examples, FLAGS_model);
    }
    return inputs;
  }
  inputs.file = open_token_file(FLAGS_data, config, environment);
  if (FLAGS_generate > 0) {
    check_generation(config, *inputs.file, shape);
    return inputs;
  }
  check_seq_len(config);
  inputs.data.emplace(inputs.file, 0, inputs.file->tokens(), FLAGS_seq_len, FLAGS_seed);
  inputs.windows = window_flag(*inputs.data);
  return inputs;
}

/// The attention that the model is to use: the controller as the options have it, and around it
/// what they want to know about it.
struct Attention {
  std::shared_ptr<LowRankController> controller;
  std::string description;                      ///< of the chosen policy, whatever is set later
  std::shared_ptr<AuditController> audit;       ///< null: no audit
  std::shared_ptr<DecisionRecorder> decisions;  ///< null: nobody writes them down
  std::shared_ptr<AttentionController> used;
};

Attention make_attention(const ModelConfig& config, const Mesh& mesh, const at::Device& device,
                         const Ablation& ablation) {
  Attention attention;
  attention.controller = attention_flags(config, mesh, device).controller;
  LowRankController& controller = *attention.controller;
  if (!FLAGS_ablate.empty()) {
    controller.leave_out(ablation);
  }
  if (!FLAGS_balance_speeds.empty()) {
    balance_for_speeds(FLAGS_balance_speeds, config, device, controller);
  }
  attention.description = controller.describe();
  controller.set_timing(true);
  attention.used = attention.controller;
  if (FLAGS_audit_rows > 0) {
    attention.used = attention.audit = std::make_shared<AuditController>(
        attention.controller, FLAGS_audit_rows, controller.bases().start);
  }
  if (!FLAGS_decisions.empty()) {
    attention.used = attention.decisions = std::make_shared<DecisionRecorder>(attention.used,
                                                                              geometry_flags());
  }
  return attention;
}

/// What a run was, for results.
void add_provenance(const Attention& attention, const MeshShape& shape,
                    const Environment& environment, Json& json) {
  json["attention"] = attention.description;
  json["dtype"] = FLAGS_dtype;
  json["device"] = FLAGS_device;
  json["threads"] = at::get_num_threads();
  json["world_size"] = environment.world_size;
  json["tp"] = shape.tp;
  json["dp"] = shape.dp;
  json["cp"] = shape.cp;
  json["versions"] = version_line();
  for (const Option& option : options()) {
    json["options"][option.name] = option.value;
  }
}

void write_lines(const std::string& path, const std::vector<Json>& lines) {
  std::string text;
  for (const Json& line : lines) {
    text += line.dump() + "\n";
  }
  write_text(path, text);
}

ExitCode evaluate(const Environment& environment) {
  check_options(environment);
  const Ablation ablation = ablation_flag();
  MeshShape shape = mesh_flags(environment);
  const at::Device device = device_flag(environment);
  const ModelConfig config = read_model_config();
  shape.kv_heads = config.num_key_value_heads;
  const Inputs inputs = read_inputs(config, shape, environment);
  agree_on_inputs(environment, attention_inputs({"model", "data", "examples"}));
  check_outputs(environment, {"json", "decisions", "examples_out"});
  const Mesh mesh = create_mesh(environment, shape, device);
  guarded(environment, [&] {
    const bool leader = environment.world_rank == 0;
    const Attention attention = make_attention(config, mesh, device, ablation);
    CausalLM model(config, mesh.tp(), attention.used,
                   {.dtype = dtype_flag("dtype", FLAGS_dtype), .device = device});
    load_weights(model, mesh.world());
    check_replicas(model, mesh);
    if (leader) {
      print_banner(std::cout, "drrl-eval",
                   {{"model", FLAGS_model},
                    {"data", inputs.describe()},
                    {"parallel",
                     c10::str("tensor ", shape.tp, " x data ", shape.dp, " x context ", shape.cp)},
                    {"attention", attention.description},
                    {"versions", version_line()}});
      for (const std::string& warning : config.warnings) {
        log_warning(warning);
      }
    }

    LowRankController& controller = *attention.controller;
    std::vector<Json> lines;
    const bool answering = inputs.file == nullptr;
    Json json = answering     ? answers(model, controller, inputs.examples, mesh, lines)
                : inputs.data ? perplexity(model, controller, attention.decisions.get(),
                                           *inputs.data, inputs.windows, mesh)
                              : generation(model, controller, *inputs.file, mesh);
    if (attention.audit) {
      add_audit(attention.audit->report(), json);
    }
    add_provenance(attention, shape, environment, json);
    if (leader) {
      (answering ? print_answers : inputs.data ? print_perplexity : print_generation)(json);
      if (attention.audit) {
        print_audit(json);
      }
      std::cout << std::flush;
      if (!FLAGS_examples_out.empty()) {
        write_lines(FLAGS_examples_out, lines);
      }
      if (attention.decisions) {
        write_lines(FLAGS_decisions, attention.decisions->lines());
      }
      if (!FLAGS_json.empty()) {
        write_text(FLAGS_json, json.dump(2) + "\n");
      }
    }
    mesh.world().barrier();
  });
  return ExitCode::kSuccess;
}

}  // namespace
}  // namespace drrl

int main(int argc, char** argv) {
  return drrl::run_program(argc, argv, "drrl-eval",
                           "drrl-eval: perplexity under a rank policy, or with --examples "
                           "accuracy, and what attention cost; with --generate, text.",
                           &drrl::evaluate);
}
