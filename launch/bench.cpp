// drrl-bench: what attention, communication and training steps cost, measured. Options: drrl-bench
// --help.

#include "launch/bench/bench.h"

#include <cstdio>
#include <cstring>
#include <string>

#include <gflags/gflags.h>

#include "core/error.h"
#include "launch/bench/flags.h"
#include "launch/options/flags.h"
#include "launch/runtime/program.h"

DEFINE_string(
    ranks, "16,32,48",
    "ranks of far tokens, a comma list; 32 is r = r_v = 32, 48/16 is r = 48 and r_v = 16");
DEFINE_int64(
    repeats, 5,
    "measurements of each competitor or collective, at least 5, of which the median is reported");
DEFINE_string(csv, "", "attention, collectives: file for the results, as CSV");

namespace drrl::bench {
namespace {

struct Command {
  const char* name;
  const char* purpose;
  ExitCode (*run)(const Environment&);
  bool parallel = false;  // takes more than one process
};

constexpr Command kCommands[] = {
    {"attention",
     "time, memory and error of low-rank attention over sequence lengths, against PyTorch's SDPA",
     &attention},
    {"latency",
     "the --latency file: what exact and low-rank attention take on this device at each rank and "
     "distance",
     &latency},
    {"peers",
     "error and time of low-rank attention and of other ways to compress it, on a real model and "
     "text",
     &peers},
    {"collectives",
     "time and bandwidth of collectives over message sizes, as nccl-tests reports them; under "
     "mpirun, srun or torchrun",
     &collectives, true},
    {"scaling",
     "steps per second, exposed communication, bytes and decompositions of training on the "
     "processes it "
     "was started with",
     &scaling, true},
    {"model",
     "what steps would take on more processes, from measured runs, and where low rank stops paying",
     &model},
};

std::string summary() {
  std::string text = "usage: drrl-bench COMMAND [options]";
  for (const Command& command : kCommands) {
    text += std::string("\n  ") + command.name + std::string(13 - std::strlen(command.name), ' ') +
            command.purpose;
  }
  return text;
}

}  // namespace
}  // namespace drrl::bench

int main(int argc, char** argv) {
  using namespace drrl;
  const std::string word = argc > 1 ? argv[1] : "";
  for (const bench::Command& command : bench::kCommands) {
    if (word == command.name) {
      argv[1] = argv[0];
      return run_program(argc - 1, argv + 1, "drrl-bench " + word, bench::summary(),
                         [&](const Environment& environment) {
                           check(ErrorKind::kUsage, command.parallel || environment.world_size == 1,
                                 "drrl-bench ", command.name,
                                 " measures one process, this job has ", environment.world_size);
                           check(ErrorKind::kUsage, FLAGS_repeats >= 5,
                                 "--repeats must be at least 5, got ", FLAGS_repeats);
                           check_outputs(environment, {"json", "csv", "plot", "dump"});
                           return command.run(environment);
                         });
    }
  }
  const auto usage = [](const Environment&) {
    std::fprintf(stderr, "%s\n", bench::summary().c_str());
    return ExitCode::kUsage;
  };
  return word.starts_with("-")
             ? run_program(argc, argv, "", bench::summary(), usage)  // --help, --version
             : static_cast<int>(usage({}));
}
