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
#include <thread>

// Exported by gflags, but in none of its headers: what it calls after it has reported a bad command line.
namespace google {
extern void (*gflags_exitfunc)(int);  // NOLINT(readability-redundant-declaration)
}

namespace drrl {
namespace {

/// Holds back what is written to stderr while it lives, where another process of the job will write the same. gflags prints its complaints
/// and exits in one go, so this stands around the parser.
class HeldStderr {
 public:
  explicit HeldStderr(bool hold) {
    if (hold) {
      memory_ = memfd_create("drrl-stderr", 0);
      terminal_ = dup(STDERR_FILENO);
      dup2(memory_, STDERR_FILENO);
    }
  }

  /// Puts stderr back and writes what was held.
  void release() {
    if (memory_ < 0) {
      return;
    }
    std::fflush(stderr);
    dup2(terminal_, STDERR_FILENO);
    char buffer[4096];
    lseek(memory_, 0, SEEK_SET);
    for (ssize_t n = 0; (n = read(memory_, buffer, sizeof(buffer))) > 0;) {
      std::fwrite(buffer, 1, static_cast<size_t>(n), stderr);
    }
    close(memory_);
    close(terminal_);
    memory_ = -1;
  }

 private:
  int memory_ = -1, terminal_ = -1;
};

HeldStderr* held_stderr = nullptr;  // what exit_with_usage releases; gflags hands its exit function no context

/// Rank 0 has usually said the same and ended the job before the others wake up.
constexpr std::chrono::milliseconds kGrace{700};

[[noreturn]] void exit_with_usage(int /*gflags_code*/) {
  if (held_stderr != nullptr) {
    std::this_thread::sleep_for(kGrace);
    held_stderr->release();
  }
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
    Option option{flag.name, flag.type, shortest(flag.type, flag.default_value), shortest(flag.type, flag.current_value), "", flag.description,
                  flag.is_default};
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
    table += "| --" + option.name + " | " + option.type + " | " + option.default_value + " | " + option.unit + " | " + option.meaning + " |\n";
  }
  return table;
}

void parse_options(int argc, char** argv, const std::string& summary) {
  const bool quiet = Environment::detect().world_rank != 0;
  if (wants_help(argc, argv)) {
    if (!quiet) {
      std::fputs((summary + "\n\n" + options_table()).c_str(), stdout);
    }
    std::exit(static_cast<int>(ExitCode::kSuccess));
  }
  HeldStderr held(quiet);
  held_stderr = quiet ? &held : nullptr;
  google::gflags_exitfunc = &exit_with_usage;
  google::SetUsageMessage(summary);
  google::ParseCommandLineFlags(&argc, &argv, /*remove_flags=*/true);
  if (argc > 1) {
    std::fprintf(stderr, "ERROR: unexpected argument '%s': options are written --name=value\n", argv[1]);
    exit_with_usage(0);
  }
  held.release();
  held_stderr = nullptr;
}

}  // namespace drrl
