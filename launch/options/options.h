#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace drrl {

/// One command line option. The table is what gflags was told: every DEFINE_* in launch/ whose help
/// text reads "meaning [unit]".
struct Option {
  std::string name, type, default_value, value, unit, meaning;
  bool is_default = true;
  std::string unused;  ///< why this run passes over it, "needs --attention=lowrank (is full)";
                       ///< empty: it does not
};

/// Where options have an effect: names, spaces between; in these commands ("drrl-train",
/// "drrl-policy record"), commas between, "" being all; under all of these conditions, spaces
/// between: "output" (switched on), "rank_policy=dp|rl", "!valid_data" (the contrary). An option of
/// several rows needs one of them.
struct OptionUse {
  const char* options;
  const char* commands;
  const char* conditions;
};

/// The rows of all programs. Every option has one.
std::span<const OptionUse> option_uses();

/// Whether a value is neither "", "0" nor "false".
bool is_switched_on(const std::string& value);

/// Why `command` passes over an option as others are set now, in words that follow its name; "" if
/// it has an effect.
std::string why_unused(const std::string& option, const std::string& command);

/// The options of this program, by name. glog's and gflags' own are not listed.
std::vector<Option> options();

/// What --help prints: the summary, the options by subject and the exit codes, in lines of 80
/// columns.
std::string options_help(const std::string& summary);

/// The options by subject as Markdown tables, what --helpmarkdown prints and launch/OPTIONS.md
/// holds.
std::string options_markdown();

/// Parses the command line of `command`, "drrl-bench model" say (gflags: --name=value, --name
/// value, --flagfile=FILE). Unknown flags, bad values, stray arguments, and options that this run
/// would pass over end the program with ExitCode::kUsage; the latter may stand in flag files, which
/// serve several runs. --help prints `summary` and options_help, --version the version, and
/// both end it with success. In a job of several processes, one a node speaks, and others whose
/// fault is theirs alone.
void parse_options(int argc, char** argv, const std::string& command, const std::string& summary);

/// The items of a list between separators; "" has none.
std::vector<std::string> split(const std::string& text, char separator);

/// Numbers of a comma list. Errors: Error(kUsage) naming the flag and the item that is not a whole
/// number of at least `least`.
std::vector<int64_t> parse_list(const char* flag, const std::string& text, int64_t least);

}  // namespace drrl
