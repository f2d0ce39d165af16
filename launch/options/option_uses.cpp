#include <algorithm>
#include <optional>
#include <sstream>

#include <gflags/gflags.h>

#include "launch/options/options.h"

namespace drrl {
namespace {

constexpr const char* kAll = "";
constexpr const char* kModels = "drrl-train, drrl-eval";
constexpr const char* kLowRank = "drrl-train, drrl-eval, drrl-bench scaling";
constexpr const char* kMeasured = "drrl-policy calibrate, drrl-policy record";
constexpr const char* kSpends = "attention=lowrank rank_policy=random|greedy|dp|rl";
constexpr const char*
    kApproximates = "attention=lowrank rank_policy=fixed|energy|random|greedy|dp|rl";

// What a run refuses by a check of its own (--balance_every without dp, --examples with --generate)
// needs no condition here.
constexpr OptionUse kUses[] = {
    {"threads timeout_s watchdog_timeout_s", kAll, ""},

    // Model, data and processes.
    {"model",
     "drrl-train, drrl-eval, drrl-policy calibrate, drrl-policy record, drrl-bench attention, "
     "drrl-bench latency, drrl-bench peers, drrl-bench scaling",
     ""},
    {"model", "drrl-bench model", "worlds"},
    {"data", "drrl-train, drrl-eval, drrl-policy calibrate, drrl-policy record, drrl-bench peers",
     ""},
    {"data", "drrl-bench attention", "model"},
    {"seq_len",
     "drrl-train, drrl-policy calibrate, drrl-policy record, drrl-bench latency, drrl-bench "
     "peers, drrl-bench scaling",
     ""},
    {"seq_len", "drrl-eval", "!generate !examples"},
    {"tp dp cp",
     "drrl-train, drrl-eval, drrl-policy calibrate, drrl-policy record, drrl-bench scaling", ""},
    {"tp dp cp", "drrl-bench collectives", "!group=world"},
    {"tp cp", "drrl-bench model", "worlds"},
    {"device",
     "drrl-train, drrl-eval, drrl-policy calibrate, drrl-policy record, drrl-policy train, "
     "drrl-bench attention, drrl-bench latency, drrl-bench peers, "
     "drrl-bench collectives, drrl-bench scaling",
     ""},
    {"dtype",
     "drrl-train, drrl-eval, drrl-policy calibrate, drrl-policy record, drrl-bench attention, "
     "drrl-bench latency, drrl-bench peers, drrl-bench scaling",
     ""},
    {"dtype", "drrl-policy train", "latency"},
    {"seed",
     "drrl-train, drrl-policy calibrate, drrl-policy record, drrl-policy train, drrl-bench "
     "latency, drrl-bench scaling",
     ""},
    {"seed", "drrl-eval", "attention=lowrank rank_policy=random"},
    {"seed", "drrl-eval", "generate temperature"},
    {"seed", "drrl-bench attention", "!model"},
    {"json",
     "drrl-train, drrl-eval, drrl-policy train, drrl-bench attention, drrl-bench peers, "
     "drrl-bench collectives, drrl-bench scaling, drrl-bench model",
     ""},

    // Attention.
    {"attention", kLowRank, ""},
    {"rank_policy", kLowRank, "attention=lowrank"},
    {"rank", kLowRank, "attention=lowrank rank_policy=fixed"},
    {"rank", "drrl-bench model", "worlds"},
    {"rank_buckets", kLowRank, "attention=lowrank rank_policy=energy|random|greedy|dp|rl"},
    {"rank_buckets", kLowRank, "attention=lowrank guard_eps"},
    {"rank_buckets",
     "drrl-policy calibrate, drrl-policy record, drrl-policy train, drrl-bench latency", ""},
    {"rank_budget", kModels, kSpends},
    {"rank_budget", "drrl-bench latency", "policy"},
    {"energy", kModels, "attention=lowrank rank_policy=energy"},
    {"policy", kLowRank, kApproximates},
    {"policy", "drrl-policy calibrate, drrl-policy record, drrl-policy train, drrl-bench latency",
     ""},
    {"latency", kModels, kSpends},
    {"latency", "drrl-policy train, drrl-bench latency", ""},
    {"guard_eps", kLowRank, kApproximates},
    {"guard_decay", "drrl-train, drrl-bench scaling", "guard_eps"},
    {"drop", kModels, kApproximates},
    {"gates", kModels, "attention=lowrank rank_policy=dp|rl"},
    {"gates", "drrl-policy train, drrl-bench latency", ""},
    {"basis_updates", kLowRank, kApproximates},
    {"basis_updates",
     "drrl-policy calibrate, drrl-policy train, drrl-bench attention, drrl-bench latency, "
     "drrl-bench peers",
     ""},
    {"basis_updates", "drrl-bench model", "worlds"},
    {"near_block sink_tokens", kLowRank, kApproximates},
    {"near_block sink_tokens", kLowRank, "!cp=1"},  // a sequence is split at blocks
    {"near_block sink_tokens", "drrl-eval", "decisions"},
    {"near_block sink_tokens",
     "drrl-policy calibrate, drrl-policy record, drrl-bench attention, drrl-bench latency, "
     "drrl-bench peers",
     ""},
    {"near_block", "drrl-policy train", "latency"},
    {"near_block sink_tokens", "drrl-bench model", "worlds"},

    // drrl-train.
    {"micro_batch global_batch steps train_tokens lr min_lr warmup_tokens weight_decay beta1 "
     "beta2 eps clip activation_checkpoint log_every",
     "drrl-train", ""},
    {"output valid_data balance_every policy_update_every", "drrl-train", ""},
    {"save_every keep resume export_dtype", "drrl-train", "output"},
    {"resume_override", "drrl-train", "resume"},
    {"valid_fraction", "drrl-train", "!valid_data"},
    {"valid_fraction", "drrl-train", "!valid_fraction"},  // nothing is held out
    {"eval_every eval_tokens", "drrl-train", "valid_fraction"},
    {"eval_every eval_tokens", "drrl-train", "valid_data"},
    {"balance_damage", "drrl-train", "balance_every"},
    {"policy_sample_rows", "drrl-train", "policy_update_every"},

    // drrl-eval.
    {"generate examples examples_out audit_rows decisions ablate balance_speeds", "drrl-eval", ""},
    {"max_tokens compare_exact", "drrl-eval", "!generate !examples"},
    {"balance_damage", "drrl-eval", "balance_speeds"},
    {"prompt_tokens temperature", "drrl-eval", "generate"},
    {"top_k", "drrl-eval", "generate temperature"},

    // drrl-policy.
    {"traces", "drrl-policy record, drrl-policy train", ""},
    {"held_out validation fit_steps reward_steps", "drrl-policy train", ""},
    {"calibration_tokens", kMeasured, ""},

    // drrl-bench.
    {"ranks", "drrl-bench attention, drrl-bench peers", ""},
    {"repeats",
     "drrl-bench attention, drrl-bench latency, drrl-bench peers, drrl-bench collectives", ""},
    {"csv", "drrl-bench attention, drrl-bench collectives", ""},
    {"backward parts plot", "drrl-bench attention", ""},
    {"layer", "drrl-bench attention", "model"},
    {"head_dims heads kv_groups", "drrl-bench attention, drrl-bench latency", "!model"},
    {"seq_lens", "drrl-bench attention", ""},
    {"seq_lens", "drrl-bench model", "worlds"},
    {"with_backward", "drrl-bench latency", ""},
    {"layers static_tokens dump", "drrl-bench peers", ""},
    {"operations bytes group", "drrl-bench collectives", ""},
    {"scaling sequences", "drrl-bench scaling", ""},
    {"scaling sequences", "drrl-bench model", "worlds"},
    {"steps warmup_steps", "drrl-bench scaling", ""},
    {"model_hidden model_layers model_heads model_kv_groups model_vocabulary", "drrl-bench scaling",
     "!model"},
    {"runs validate worlds alpha_us gbps", "drrl-bench model", ""},
    {"tolerance", "drrl-bench model", "validate"},
    {"node_size", "drrl-bench model", "worlds"},
};

bool has_word(const std::string& words, const std::string& word) {
  return (" " + words + " ").find(" " + word + " ") != std::string::npos;
}

bool has_command(const OptionUse& use, const std::string& command) {
  return *use.commands == '\0' ||
         (", " + std::string(use.commands) + ",").find(", " + command + ",") != std::string::npos;
}

/// "name" (switched on), "name=value|value", or the contrary with a "!" before.
struct Condition {
  explicit Condition(const std::string& text) : negated(text[0] == '!') {
    const std::string rest = text.substr(negated ? 1 : 0);
    const size_t equals = rest.find('=');
    name = rest.substr(0, equals);
    if (equals != std::string::npos) {
      values = split(rest.substr(equals + 1), '|');
    }
    google::GetCommandLineOption(name.c_str(), &value);
  }

  bool holds() const {
    return negated != (values.empty()
                           ? is_switched_on(value)
                           : std::find(values.begin(), values.end(), value) != values.end());
  }

  /// As it stands after "needs" or, negated, after "has no effect with".
  std::string text() const {
    if (negated) {
      return "--" + name + "=" + value;
    }
    std::string text = "--" + name;
    for (size_t i = 0; i < values.size(); ++i) {
      text += (i == 0 ? "=" : i + 1 == values.size() ? " or " : ", ") + values[i];
    }
    return text + (values.empty() ? "" : " (is " + value + ")");
  }

  bool negated;
  std::string name, value;
  std::vector<std::string> values;
};

std::vector<Condition> unmet(const OptionUse& use) {
  std::vector<Condition> result;
  std::istringstream conditions(use.conditions);
  for (std::string text; conditions >> text;) {
    if (Condition condition(text); !condition.holds()) {
      result.push_back(condition);
    }
  }
  return result;
}

}  // namespace

std::span<const OptionUse> option_uses() {
  return kUses;
}

bool is_switched_on(const std::string& value) {
  return !value.empty() && value != "0" && value != "false";
}

std::string why_unused(const std::string& option, const std::string& command) {
  bool listed = false;
  std::optional<std::vector<Condition>> missing;  // of the first row
  for (const OptionUse& use : option_uses()) {
    if (!has_word(use.options, option)) {
      continue;
    }
    listed = true;
    if (has_command(use, command)) {
      const auto conditions = unmet(use);
      if (conditions.empty()) {
        return "";
      }
      missing = missing ? missing : conditions;
    }
  }
  if (!listed) {
    return "";
  }
  if (!missing) {
    return "has no effect in " + command;
  }
  std::string needs, against;
  for (const Condition& condition : *missing) {
    std::string& text = condition.negated ? against : needs;
    text += (text.empty() ? (condition.negated ? "has no effect with " : "needs ") : " and ") +
            condition.text();
  }
  return needs + (needs.empty() || against.empty() ? "" : ", ") + against;
}

}  // namespace drrl
