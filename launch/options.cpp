#include "launch/options.h"

#include "core/error.h"
#include "distributed/environment.h"
#include "launch/exit_codes.h"

#include <gflags/gflags.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>
#include <sstream>
#include <thread>

// Exported by gflags, but in none of its headers: what it calls after it has reported a bad command line.
namespace google {
extern void (*gflags_exitfunc)(int);  // NOLINT(readability-redundant-declaration)
}

namespace drrl {
namespace {

/// While it lives, nothing comes out of stderr: gflags prints its complaints and exits in one go, and one process of a node is enough to be heard. If this one
/// exits and lives on for a moment, as it does unless the others end too, the fault is its own, and what was held back comes out after all.
class LateStderr {
 public:
  explicit LateStderr(bool late) {
    if (late) {
      saved = dup(STDERR_FILENO);
      held = memfd_create("stderr", MFD_CLOEXEC);
      dup2(held, STDERR_FILENO);
      std::atexit(&speak);
    }
  }
  LateStderr(const LateStderr&) = delete;
  LateStderr& operator=(const LateStderr&) = delete;
  ~LateStderr() {
    if (saved >= 0) {
      std::fflush(stderr);
      dup2(saved, STDERR_FILENO);
      close(saved);
      close(held);
      saved = -1;
    }
  }

 private:
  static void speak() {
    if (saved < 0) {
      return;
    }
    std::fflush(stderr);
    std::this_thread::sleep_for(std::chrono::seconds(3));  // mpirun takes one to end the others
    char buffer[4096];
    ssize_t n = 0;
    for (off_t offset = 0; (n = pread(held, buffer, sizeof(buffer), offset)) > 0; offset += n) {
      [[maybe_unused]] const ssize_t written = write(saved, buffer, static_cast<size_t>(n));
    }
  }

  inline static int saved = -1, held = -1;
};

[[noreturn]] void exit_with_usage(int /*gflags_code*/) {
  std::exit(static_cast<int>(ExitCode::kUsage));
}

/// gflags prints 0.1 as 0.10000000000000001; this is the shortest text that means the same number.
std::string shortest(const std::string& type, const std::string& text) {
  if (type != "double") {
    return text;
  }
  char buffer[40];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), std::strtod(text.c_str(), nullptr)).ptr;
  return {buffer, end};
}

/// gflags passes over what it does not know in a --flagfile without a word, a misspelt option included. Returns a complaint, or nothing.
std::optional<std::string> flagfile_problem(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    return "cannot read --flagfile=" + path;
  }
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    const size_t begin = line.find_first_not_of(" \t\r");
    if (begin == std::string::npos || line[begin] == '#') {
      continue;
    }
    const size_t name_begin = line.find_first_not_of('-', begin);
    const std::string where = path + ":" + std::to_string(number) + ": ";
    if (name_begin == begin || name_begin == std::string::npos) {
      return where + "'" + line + "' is not an option: write --name=value";
    }
    const std::string name = line.substr(name_begin, line.find_first_of("= \t\r", name_begin) - name_begin);
    google::CommandLineFlagInfo flag;
    const bool known = google::GetCommandLineFlagInfo(name.c_str(), &flag) ||
                       (name.starts_with("no") && google::GetCommandLineFlagInfo(name.c_str() + 2, &flag) && flag.type == "bool");
    if (!known) {
      return where + "unknown option '" + name + "'";
    }
    const size_t equals = line.find('=', name_begin);
    if (equals == std::string::npos && flag.type != "bool") {
      return where + "option '" + name + "' has no value: write --" + name + "=value";
    }
  }
  return std::nullopt;
}

/// The files of --flagfile=A,B and --flagfile A,B.
std::vector<std::string> flagfiles(int argc, char** argv) {
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    std::string argument = argv[i];
    argument.erase(0, std::min(argument.find_first_not_of('-'), argument.size()));
    if (argument == "flagfile" && i + 1 < argc) {
      argument = "flagfile=" + std::string(argv[++i]);
    }
    if (argument.starts_with("flagfile=")) {
      std::istringstream list(argument.substr(9));
      for (std::string file; std::getline(list, file, ',');) {
        files.push_back(file);
      }
    }
  }
  return files;
}

bool wants_help(int argc, char** argv) {
  return std::any_of(argv + 1, argv + argc, [](const char* argument) {
    return std::strcmp(argument, "--help") == 0 || std::strcmp(argument, "-help") == 0 || std::strcmp(argument, "-h") == 0;
  });
}

}  // namespace

std::vector<Option> options() {
  std::vector<google::CommandLineFlagInfo> all;
  google::GetAllFlags(&all);
  std::vector<Option> ours;
  for (const auto& flag : all) {
    if (flag.filename.find("launch/") == std::string::npos) {
      continue;
    }
    Option option{
        flag.name,        flag.type,      shortest(flag.type, flag.default_value), shortest(flag.type, flag.current_value), "",
        flag.description, flag.is_default};
    const size_t bracket = option.meaning.rfind(" [");
    if (bracket != std::string::npos && option.meaning.back() == ']') {
      option.unit = option.meaning.substr(bracket + 2, option.meaning.size() - bracket - 3);
      option.meaning.resize(bracket);
    }
    ours.push_back(option);
  }
  std::sort(ours.begin(), ours.end(), [](const Option& a, const Option& b) { return a.name < b.name; });
  return ours;
}

std::string options_table() {
  std::string table = "| option | type | default | unit | meaning |\n|---|---|---|---|---|\n";
  for (const Option& option : options()) {
    table += "| --" + option.name + " | " + option.type + " | " + option.default_value + " | " + option.unit + " | " +
             option.meaning + " |\n";
  }
  return table;
}

void parse_options(int argc, char** argv, const std::string& summary) {
  const Environment environment = Environment::detect();
  if (wants_help(argc, argv)) {
    if (environment.world_rank == 0) {
      std::fputs((summary + "\n\n" + options_table()).c_str(), stdout);
    }
    std::exit(static_cast<int>(ExitCode::kSuccess));
  }
  const LateStderr late(environment.local_rank != 0);
  google::gflags_exitfunc = &exit_with_usage;
  google::SetUsageMessage(summary);
  for (const std::string& file : flagfiles(argc, argv)) {
    if (const auto problem = flagfile_problem(file)) {
      std::fprintf(stderr, "ERROR: %s\n", problem->c_str());
      exit_with_usage(0);
    }
  }
  google::ParseCommandLineFlags(&argc, &argv, /*remove_flags=*/true);
  if (argc > 1) {
    std::fprintf(stderr, "ERROR: unexpected argument '%s': options are written --name=value\n", argv[1]);
    exit_with_usage(0);
  }
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> items;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, separator);) {
    items.push_back(item);
  }
  return items;
}

std::vector<int64_t> parse_list(const char* flag, const std::string& text, int64_t least) {
  std::vector<int64_t> numbers;
  for (const std::string& item : split(text, ',')) {
    int64_t number = 0;
    const auto [end, error] = std::from_chars(item.data(), item.data() + item.size(), number);
    check(ErrorKind::kUsage, error == std::errc() && end == item.data() + item.size() && number >= least, "--", flag, "=", text, ": '", item,
          "' is not a whole number of at least ", least);
    numbers.push_back(number);
  }
  check(ErrorKind::kUsage, !numbers.empty(), "--", flag, " is empty: write numbers with commas between");
  return numbers;
}

}  // namespace drrl
