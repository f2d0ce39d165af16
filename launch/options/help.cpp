#include <algorithm>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "launch/options/options.h"

namespace drrl {
namespace {

// Subjects, and the options that belong to each.
constexpr std::pair<const char*, const char*> kSubjects[] = {
    {"Model and data",
     "model data valid_data valid_fraction seq_len seed examples max_tokens calibration_tokens "
     "traces"},
    {"Processes and devices", "tp dp cp device dtype threads timeout_s watchdog_timeout_s"},
    {"Attention", "attention near_block sink_tokens basis_updates"},
    {"Ranks of far tokens",
     "rank_policy policy rank rank_budget rank_buckets energy gates drop latency guard_eps "
     "guard_decay "
     "balance_every balance_damage balance_speeds policy_update_every policy_sample_rows"},
    {"Training",
     "steps train_tokens micro_batch global_batch lr min_lr warmup_tokens weight_decay beta1 beta2 "
     "eps clip activation_checkpoint eval_every eval_tokens"},
    {"Fitting a rank policy", "held_out validation fit_steps reward_steps"},
    {"Evaluation", "compare_exact audit_rows ablate"},
    {"Generation", "generate prompt_tokens temperature top_k"},
    {"What is measured",
     "ranks seq_lens head_dims heads kv_groups layer layers backward with_backward parts repeats "
     "static_tokens operations bytes group scaling sequences warmup_steps model_hidden "
     "model_layers "
     "model_heads model_kv_groups model_vocabulary"},
    {"Model of scaling", "runs worlds node_size validate tolerance alpha_us gbps"},
    {"Output",
     "output json log_every save_every keep resume resume_override export_dtype examples_out "
     "decisions csv plot dump"},
};

constexpr const char* kExitCodes =
    R"(Exit codes: 0 success, 1 unexpected, 2 usage, 3 model, 4 data, 5 checkpoint,
6 storage, 7 communication, 8 numerics, 9 internal, 10 interrupted and saved,
11 hung. launch/OPTIONS.md says more about each.
)";

// By subject the program's options, in the order of kSubjects; what belongs to none is last.
std::vector<std::pair<std::string, std::vector<Option>>> by_subject() {
  std::map<std::string, Option> left;
  for (const Option& option : options()) {
    left.emplace(option.name, option);
  }
  std::vector<std::pair<std::string, std::vector<Option>>> subjects;
  const auto add = [&](const std::string& title, const std::vector<std::string>& names) {
    std::vector<Option> found;
    for (const std::string& name : names) {
      if (const auto at = left.find(name); at != left.end()) {
        found.push_back(at->second);
        left.erase(at);
      }
    }
    if (!found.empty()) {
      subjects.emplace_back(title, std::move(found));
    }
  };
  for (const auto& [title, names] : kSubjects) {
    add(title, split(names, ' '));
  }
  std::vector<std::string> rest;
  for (const auto& [name, option] : left) {
    rest.push_back(name);
  }
  add("Other", rest);
  return subjects;
}

// The words in lines of at most `columns`, each behind `indent` spaces.
std::string wrapped(const std::string& text, size_t indent, size_t columns) {
  std::istringstream words(text);
  std::string lines, line;
  for (std::string word; words >> word;) {
    if (!line.empty() && indent + line.size() + 1 + word.size() > columns) {
      lines += std::string(indent, ' ') + line + "\n";
      line.clear();
    }
    line += (line.empty() ? "" : " ") + word;
  }
  return lines + std::string(indent, ' ') + line + "\n";
}

}  // namespace

std::string options_help(const std::string& summary) {
  constexpr size_t kIndent = 6, kColumns = 80;
  std::string text = wrapped(summary, 0, kColumns) +
                     "\nOptions and their defaults, written --name=value;\n"
                     "--flagfile=FILE reads them from a file.\n";
  for (const auto& [title, members] : by_subject()) {
    text += "\n" + title + "\n";
    for (const Option& option : members) {
      text += "  --" + option.name + "=" + option.default_value +
              (option.unit.empty() ? "" : "  [" + option.unit + "]") + "\n" +
              wrapped(option.meaning, kIndent, kColumns);
    }
  }
  return text + "\n" + kExitCodes;
}

std::string options_markdown() {
  std::string text;
  for (const auto& [title, members] : by_subject()) {
    text += (text.empty() ? "### " : "\n### ") + title +
            "\n\n| option | type | default | unit | meaning |\n|---|---|---|---|---|\n";
    for (const Option& option : members) {
      text += "| --" + option.name + " | " + option.type + " | " + option.default_value + " | " +
              option.unit + " | " + option.meaning + " |\n";
    }
  }
  return text;
}

}  // namespace drrl
