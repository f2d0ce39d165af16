#include "launch/options/options.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <set>
#include <sstream>
#include <thread>
#include <utility>

#include <gflags/gflags.h>

#include "core/error.h"
#include "distributed/topology/environment.h"
#include "launch/runtime/exit_codes.h"
#include "launch/runtime/process.h"

// Exported by gflags, but in none of its headers: what it calls after it has reported a bad command
// line.
namespace google {
extern void (*gflags_exitfunc)(int);  // NOLINT(readability-redundant-declaration)
}

namespace drrl {
namespace {

/// While it lives, nothing comes out of stderr: gflags prints its complaints and exits in one go,
/// and one process of a node is enough to be heard. If this one exits and lives on for a moment, as
/// it does unless the others end too, the fault is its own, and what was held back comes out after
/// all.
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

/// gflags prints 0.1 as 0.10000000000000001; this is the shortest text that means the same number.
std::string shortest(const std::string& type, const std::string& text) {
  if (type != "double") {
    return text;
  }
  char buffer[40];
  const auto
      end = std::to_chars(buffer, buffer + sizeof(buffer), std::strtod(text.c_str(), nullptr)).ptr;
  return {buffer, end};
}

/// The smallest number of letters to change, leave out or put in that makes `a` of `b`.
size_t edits(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      diagonal = std::exchange(row[j], std::min({diagonal + (a[i - 1] == b[j - 1] ? 0 : 1),
                                                 row[j] + 1, row[j - 1] + 1}));
    }
  }
  return row.back();
}

/// ": did you mean --lr or --min_lr?", options that are spelt or described much like `name`; or
/// where to look.
std::string suggestion(std::string name) {
  std::replace(name.begin(), name.end(), '-', '_');
  std::string words = name, found;
  std::replace(words.begin(), words.end(), '_', ' ');
  for (const Option& option : options()) {
    if (edits(name, option.name) <= std::max<size_t>(1, name.size() / 4) ||
        (name.size() > 3 && option.meaning.find(words) != std::string::npos)) {
      found += (found.empty() ? "--" : " or --") + option.name;
    }
  }
  return found.empty() ? ": --help lists all" : ": did you mean " + found + "?";
}

/// What a flag file holds. A pipe is read only once, and not waited for without end. Errors:
/// Error(kUsage).
std::string read_flag_file(const std::string& path, bool shared) {
  constexpr size_t kMostBytes = size_t{1} << 20;
  constexpr int kPatienceMs = 5000;
  const std::string what = "--flagfile=" + path;
  const int opened = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  check(ErrorKind::kUsage, opened >= 0, "cannot read ", what, ": ", std::strerror(errno));
  const std::unique_ptr<const int, void (*)(const int*)> closed_after(
      &opened, [](const int* descriptor) { close(*descriptor); });
  struct stat status{};
  check(ErrorKind::kUsage, fstat(opened, &status) == 0 && !S_ISDIR(status.st_mode), what,
        " is a folder, expected a file of options, one a line");
  check(ErrorKind::kUsage, S_ISREG(status.st_mode) || !shared, what,
        " is no regular file, and only one of this job's processes could read it: write a file");
  std::string text;
  while (true) {
    pollfd ready{opened, POLLIN, 0};
    check(ErrorKind::kUsage, poll(&ready, 1, kPatienceMs) > 0, what, ": nothing came for ",
          kPatienceMs / 1000, " s");
    char buffer[4096];
    const ssize_t n = read(opened, buffer, sizeof(buffer));
    check(ErrorKind::kUsage, n >= 0, "cannot read ", what, ": ", std::strerror(errno));
    if (n == 0) {
      break;
    }
    text.append(buffer, static_cast<size_t>(n));
    check(ErrorKind::kUsage, text.size() <= kMostBytes, what, " is longer than ", kMostBytes,
          " bytes, expected options, one a line");
  }
  check(ErrorKind::kUsage, text.find('\0') == std::string::npos, what, " is not a text");
  return text;
}

/// The command line with the options of flag files in their places: gflags passes over what it does
/// not know in a file, and reads files twice.
struct Arguments {
  std::vector<std::string> all;
  std::set<std::string> direct = {};  // the options on the command line itself
  bool shared = false;                // by the processes of a job

  void add(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      const size_t begin = argument.find_first_not_of('-');
      if (begin == 0 || begin == std::string::npos) {  // gflags returns what is no option
        all.insert(all.end(), argv + i, argument == "--" ? argv + argc : argv + i + 1);
        i = argument == "--" ? argc : i;
        continue;
      }
      const google::CommandLineFlagInfo flag = known(argument, "");
      const bool two = flag.type != "bool" && argument.find('=') == std::string::npos &&
                       i + 1 < argc;  // --name value
      direct.insert(flag.name);
      if (flag.name == "flagfile") {
        add_files(two ? argv[i + 1]
                      : argument.substr(std::min(argument.find('='), argument.size() - 1) + 1),
                  "", 0);
      } else {
        all.insert(all.end(), argv + i, argv + i + (two ? 2 : 1));
      }
      i += two ? 1 : 0;
    }
  }

 private:
  /// The option of "--name=value", "--name" or "--noname".
  static google::CommandLineFlagInfo known(const std::string& argument, const std::string& where) {
    const size_t begin = argument.find_first_not_of('-');
    const std::string name = argument.substr(begin, argument.find_first_of("= \t", begin) - begin);
    google::CommandLineFlagInfo flag;
    const bool found = google::GetCommandLineFlagInfo(name.c_str(), &flag) ||
                       (name.starts_with("no") &&
                        google::GetCommandLineFlagInfo(name.c_str() + 2, &flag) &&
                        flag.type == "bool");
    check(ErrorKind::kUsage, found, where, "unknown option --", name, suggestion(name));
    return flag;
  }

  void add_files(const std::string& list, const std::string& where, int depth) {
    constexpr int kDeepest = 8;
    const auto files = split(list, ',');
    check(ErrorKind::kUsage, !files.empty(), where, "--flagfile= names no file");
    for (const std::string& file : files) {
      check(ErrorKind::kUsage, depth < kDeepest, where, "--flagfile=", file, " is the ",
            kDeepest + 1, "th file inside each other: does it include itself?");
      std::istringstream lines(read_flag_file(file, shared));
      std::string line;
      for (int number = 1; std::getline(lines, line); ++number) {
        line.erase(line.find_last_not_of(" \t\r") + 1);
        line.erase(0, line.find_first_not_of(" \t"));
        if (line.empty() || line[0] == '#') {
          continue;
        }
        const std::string here = file + ":" + std::to_string(number) + ": ";
        const size_t begin = line.find_first_not_of('-');
        check(ErrorKind::kUsage, begin != 0 && begin != std::string::npos, here, "'", line,
              "' is not an option: write --name=value");
        const google::CommandLineFlagInfo flag = known(line, here);
        const size_t equals = line.find('=');
        check(ErrorKind::kUsage, equals != std::string::npos || flag.type == "bool", here,
              "option '", flag.name, "' has no value: write --", flag.name, "=value");
        if (flag.name == "flagfile") {
          add_files(line.substr(equals + 1), here, depth + 1);
        } else {
          all.push_back(line);
        }
      }
    }
  }
};

bool asks_for(int argc, char** argv, std::initializer_list<const char*> words) {
  return std::any_of(argv + 1, argv + argc, [&](const std::string& argument) {
    return std::find(words.begin(), words.end(), argument) != words.end();
  });
}

std::string program_command;

/// Errors: Error(kUsage) naming each of these options that the run would pass over.
void check_used(const std::set<std::string>& given) {
  std::string problems;
  for (const Option& option : options()) {
    if (given.contains(option.name) && !option.unused.empty() &&
        (is_switched_on(option.value) || option.value != option.default_value)) {
      problems += (problems.empty() ? "--" : "\nERROR: --") + option.name + "=" + option.value +
                  " " + option.unused;
    }
  }
  check(ErrorKind::kUsage, problems.empty(), problems);
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
    Option option{flag.name,
                  flag.type,
                  shortest(flag.type, flag.default_value),
                  shortest(flag.type, flag.current_value),
                  "",
                  flag.description,
                  flag.is_default,
                  program_command.empty() ? "" : why_unused(flag.name, program_command)};
    const size_t bracket = option.meaning.rfind(" [");
    if (bracket != std::string::npos && option.meaning.back() == ']') {
      option.unit = option.meaning.substr(bracket + 2, option.meaning.size() - bracket - 3);
      option.meaning.resize(bracket);
    }
    ours.push_back(option);
  }
  std::sort(ours.begin(), ours.end(),
            [](const Option& a, const Option& b) { return a.name < b.name; });
  return ours;
}

void parse_options(int argc, char** argv, const std::string& command, const std::string& summary) {
  const Environment environment = Environment::detect();
  const bool help = asks_for(argc, argv, {"--help", "-help", "-h"}),
             markdown = asks_for(argc, argv, {"--helpmarkdown"});
  if (help || markdown || asks_for(argc, argv, {"--version", "-version"})) {
    if (environment.world_rank == 0) {
      std::fputs((help       ? options_help(summary)
                  : markdown ? options_markdown()
                             : version_line() + "\n")
                     .c_str(),
                 stdout);
    }
    std::exit(static_cast<int>(ExitCode::kSuccess));
  }
  const LateStderr late(environment.local_rank != 0);
  google::gflags_exitfunc = [](int code) {
    std::exit(static_cast<int>(code == 0 ? ExitCode::kSuccess : ExitCode::kUsage));
  };
  google::SetUsageMessage(summary);
  try {
    Arguments arguments{.all = {argv[0]}, .shared = environment.world_size > 1};
    arguments.add(argc, argv);
    std::vector<char*> pointers;
    for (std::string& argument : arguments.all) {
      pointers.push_back(argument.data());
    }
    pointers.push_back(nullptr);
    int count = static_cast<int>(arguments.all.size());
    char** rest = pointers.data();
    google::ParseCommandLineNonHelpFlags(&count, &rest, /*remove_flags=*/true);
    google::gflags_exitfunc = [](int /*code*/) { std::exit(static_cast<int>(ExitCode::kSuccess)); };
    google::HandleCommandLineHelpFlags();  // --helpxml and the like
    check(ErrorKind::kUsage, count == 1, "unexpected argument '", count > 1 ? rest[1] : "",
          "': options are written --name=value");
    check(ErrorKind::kUsage, google::GetCommandLineFlagInfoOrDie("flagfile").is_default,
          "--flagfile must stand on the command line or in a flag file");
    program_command = command;
    check_used(arguments.direct);
  } catch (const Error& error) {
    std::fprintf(stderr, "ERROR: %s\n", error.what());
    std::exit(static_cast<int>(ExitCode::kUsage));
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
    check(ErrorKind::kUsage,
          error == std::errc() && end == item.data() + item.size() && number >= least, "--", flag,
          "=", text, ": '", item, "' is not a whole number of at least ", least);
    numbers.push_back(number);
  }
  check(ErrorKind::kUsage, !numbers.empty(), "--", flag,
        " is empty: write numbers with commas between");
  return numbers;
}

}  // namespace drrl
