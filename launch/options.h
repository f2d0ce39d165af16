#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace drrl {

/// One command line option. The table is what gflags was told: every DEFINE_* in launch/ whose help text reads "meaning
/// [unit]".
struct Option {
  std::string name, type, default_value, value, unit, meaning;
  bool is_default = true;
};

/// The options of this program, by name. glog's and gflags' own are not listed.
std::vector<Option> options();

/// The table as `--help` prints it: Markdown, so that the same text stands in launch/OPTIONS.md.
std::string options_table();

/// Parses the command line (gflags: --name=value, --name value, --flagfile=FILE). Unknown flags, bad values and stray arguments
/// end the program with ExitCode::kUsage; --help prints `summary` and the table and ends it with success. In a job of several
/// processes, one a node speaks, and others whose fault is theirs alone.
void parse_options(int argc, char** argv, const std::string& summary);

/// The items of a list between separators; "" has none.
std::vector<std::string> split(const std::string& text, char separator);

/// Numbers of a comma list. Errors: Error(kUsage) naming the flag and the item that is not a whole number of at least `least`.
std::vector<int64_t> parse_list(const char* flag, const std::string& text, int64_t least);

}  // namespace drrl
