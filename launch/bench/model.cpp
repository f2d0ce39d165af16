// drrl-bench model: fits a model of the step time to measured runs, checks it on runs that it was
// not fitted to, and says what more processes would give and where low rank stops paying. What is
// modelled: launch/bench/scaling_model.h.

#include <algorithm>
#include <cmath>
#include <iostream>

#include <gflags/gflags.h>

#include "core/error.h"
#include "core/io/file_io.h"
#include "launch/bench/bench.h"
#include "launch/bench/flags.h"
#include "launch/bench/scaling_model.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/options/policy_flags.h"
#include "launch/runtime/console.h"
#include "launch/runtime/program.h"

DECLARE_int64(cp);
DECLARE_string(seq_lens);
DECLARE_string(scaling);
DECLARE_int64(sequences);
DEFINE_string(runs, "",
              "model: files of drrl-bench scaling, launch/bench/scaling.sh and drrl-bench "
              "collectives that it is fitted to, a comma list");
DEFINE_string(validate, "",
              "model: files of drrl-bench scaling or launch/bench/scaling.sh that it is not fitted "
              "to and should predict, a comma list");
DEFINE_double(tolerance, 0.15,
              "model: largest relative error of a step of --validate; a larger one ends the "
              "program with code 1");
DEFINE_string(worlds, "8,64,1024",
              "model: numbers of processes to predict steps for, a comma list [processes]");
DEFINE_int64(node_size, 0,
             "model: processes of a node there, each with cores of its own; 0: as many as the "
             "measured node has cores for, on CUDA as it ran [processes]");
DEFINE_double(alpha_us, -1, "model: latency of a message between nodes; -1: as measured [us]");
DEFINE_double(
    gbps, 0,
    "model: bandwidth between nodes, of each process in each direction; 0: as measured [Gbit/s]");

namespace drrl::bench {
namespace {

using Json = nlohmann::ordered_json;

const char* name(StepModel::Source source) {
  return source == StepModel::Source::kGiven      ? "given"
         : source == StepModel::Source::kMeasured ? "measured"
                                                  : "unknown";
}

Measured read_files(const std::string& files, std::optional<std::string>& setting) {
  Measured all;
  for (const std::string& path : split(files, ',')) {
    const auto watched = watch(watchdog(), "reading runs");
    Measured file = read_measured(path, setting);
    all.equations.insert(all.equations.end(), file.equations.begin(), file.equations.end());
    all.workloads.insert(all.workloads.end(), file.workloads.begin(), file.workloads.end());
  }
  all.equations = medians(all.equations);
  return all;
}

/// Prints and returns what the model says of each equation, and the largest relative error of those
/// of full weight: whole steps.
std::pair<Json, double> compare(const StepModel& model, const std::vector<Equation>& equations) {
  std::vector<std::vector<std::string>> table = {
      {"run", "measured ms", "slower", "model ms", "error"}};
  Json rows = Json::array();
  double worst = 0;
  for (const Equation& e : equations) {
    const double pace = model.pace(e), ms = pace * model.predict(e.demand).total(),
                 error = ms / e.ms - 1;
    worst = e.weight == 1 ? std::max(worst, std::abs(error)) : worst;
    table.push_back({e.name, format("%.3g", e.ms),
                     e.yardstick_ms > 0 ? format("%+.1f %%", 100 * (pace - 1)) : "",
                     format("%.3g", ms), format("%+.1f %%", 100 * error)});
    rows.push_back({{"run", e.name},
                    {"measured_ms", e.ms},
                    {"pace", pace},
                    {"model_ms", ms},
                    {"error", error}});
  }
  print_table(std::cout, table);
  if (std::any_of(equations.begin(), equations.end(),
                  [](const Equation& e) { return e.yardstick_ms > 0; })) {
    std::cout << "slower: the machine's speed then, by a fixed amount of work done again and again "
                 "meanwhile, against the median of the runs fitted to; the model's ms are at that "
                 "speed\n";
  }
  return {rows, worst};
}

/// A cost as people know it: Gflop/s, GB/s, us.
std::string rate(size_t cost, double ms) {
  switch (cost) {
    case kUpdate:
    case kLayer: return "";
    case kMessage:
    case kNetworkMessage: return format("%.1f us", 1e3 * ms);
    case kReduce:
    case kBytes:
    case kNetworkBytes: return ms > 0 ? format("%.3f GB/s", 1 / ms) : "";
    default: return ms > 0 ? format("%.1f Gflop/s", 1e3 / ms) : "";
  }
}

Json print_costs(const StepModel& model) {
  std::vector<std::vector<std::string>> table = {{"cost", "ms", "for each", "", "", "of"}};
  Json costs;
  for (size_t i = 0; i < kCostCount; ++i) {
    if (model.sources[i] != StepModel::Source::kUnknown) {
      table.push_back({kCosts[i].key, format("%.4g", model.costs[i]), kCosts[i].unit,
                       rate(i, model.costs[i]), name(model.sources[i]), kCosts[i].meaning});
      costs[kCosts[i].key] = {
          {"ms", model.costs[i]}, {"for_each", kCosts[i].unit}, {"source", name(model.sources[i])}};
    }
  }
  print_table(std::cout, table);
  std::cout << "contention " << format("%.2f", model.contention)
            << " (work takes longer by it when all other cores of the node work), overlap "
            << format("%.2f", model.overlap) << " (of gradients' messages with work), waiting "
            << format("%.2f", model.waiting)
            << " (all takes longer by it where processes that wait for each other share cores)\n";
  return costs;
}

/// The measured case on another machine: the same processors, in nodes of --node_size processes,
/// each with cores of its own.
Workload target(const Workload& like, int64_t world, int64_t seq_len, int64_t rank) {
  Workload w = like;
  if (!FLAGS_model.empty()) {
    w.config = read_config();
  }
  check(ErrorKind::kUsage, world % (FLAGS_tp * FLAGS_cp) == 0, "--worlds=", FLAGS_worlds, ": ",
        world, " processes cannot be divided by --tp=", FLAGS_tp, " and --cp=", FLAGS_cp);
  w.shape = {.tp = FLAGS_tp, .dp = world / (FLAGS_tp * FLAGS_cp), .cp = FLAGS_cp};
  w.seq_len = seq_len;
  w.sequences = FLAGS_scaling == "weak" ? FLAGS_sequences * world : FLAGS_sequences;
  check(ErrorKind::kUsage, w.sequences >= w.shape.dp, "--sequences=", FLAGS_sequences,
        " in all (--scaling=strong) cannot be dealt out to ", w.shape.dp,
        " data-parallel processes");
  w.rank = rank;
  w.geometry = geometry_flags();
  w.basis_updates = FLAGS_basis_updates;
  w.processes_per_node = FLAGS_node_size > 0 ? FLAGS_node_size
                         : like.cores_per_node > 0
                             ? std::max<int64_t>(1, like.cores_per_node / like.threads)
                             : like.processes_per_node;
  w.cores_per_node = like.cores_per_node > 0 ? w.processes_per_node * w.threads : 0;
  return w;
}

/// What of the predictions the runs have not shown.
std::vector<std::string> extrapolations(const Workload& w, const std::vector<Workload>& measured) {
  std::vector<std::string> notes;
  const auto unseen = [&](const char* what, int64_t value, auto&& of) {
    if (std::none_of(measured.begin(), measured.end(),
                     [&](const Workload& m) { return of(m) == value; })) {
      notes.push_back(c10::str(what, " ", value));
    }
  };
  unseen("head_dim", w.config.head_dim, [](const Workload& m) { return m.config.head_dim; });
  unseen("hidden size", w.config.hidden_size,
         [](const Workload& m) { return m.config.hidden_size; });
  unseen("rank", w.rank, [](const Workload& m) { return m.rank; });
  unseen("near_block", w.geometry.near_block,
         [](const Workload& m) { return m.geometry.near_block; });
  unseen("basis_updates", w.basis_updates, [](const Workload& m) { return m.basis_updates; });
  return notes;
}

/// The shortest length from which on low rank is faster at every longer one, of those between which
/// it doubles twice; 0: none up to a million tokens.
int64_t pays_from(const StepModel& model, const Workload& like, int64_t world) {
  const int64_t unit = FLAGS_near_block * 2 *
                       FLAGS_cp;  // a split sequence has at least this many tokens
  constexpr int64_t kLongest = int64_t{1} << 20;
  int64_t from = 0;
  for (double length = static_cast<double>(unit); length <= kLongest; length *= std::sqrt(2.0)) {
    const int64_t tokens = std::max<int64_t>(1, std::llround(length / static_cast<double>(unit))) *
                           unit;
    const double exact = model.predict(demand_of(target(like, world, tokens, like.config.head_dim)))
                             .total();
    const bool pays = model.predict(demand_of(target(like, world, tokens, FLAGS_rank))).total() <
                      exact;
    from = pays ? (from > 0 ? from : tokens) : 0;
  }
  return from;
}

Json predict(const StepModel& model, const Measured& measured) {
  const Workload& like = measured.workloads.front();
  const auto worlds = parse_list("worlds", FLAGS_worlds, 1),
             lengths = parse_list("seq_lens", FLAGS_seq_lens, 1);
  const Workload first = target(like, worlds.front(), lengths.front(), FLAGS_rank);
  const int64_t exact_rank = first.config.head_dim;
  check(ErrorKind::kUsage, FLAGS_rank >= 1 && FLAGS_rank < exact_rank, "--rank=", FLAGS_rank,
        " must lie in [1, ", exact_rank, "), below the head_dim");
  std::cout << "\npredicted, " << FLAGS_scaling << " scaling, " << FLAGS_sequences << " sequences "
            << (FLAGS_scaling == "weak" ? "for each process" : "in all") << ", tp " << FLAGS_tp
            << ", cp " << FLAGS_cp << ", nodes of " << first.processes_per_node
            << " processes, each as fast as the measured one with all cores of its node at work\n";
  const auto notes = extrapolations(first, measured.workloads);
  if (!notes.empty()) {
    std::cout << "not among the runs, so costs are extrapolated: ";
    for (size_t i = 0; i < notes.size(); ++i) {
      std::cout << (i > 0 ? ", " : "") << notes[i];
    }
    std::cout << "\n";
  }
  std::vector<std::vector<std::string>> table = {{"processes", "L", "exact ms", "exposed",
                                                  c10::str("rank ", FLAGS_rank, " ms"), "exposed",
                                                  "speedup", "tokens/s"}};
  Json rows = Json::array(), crossings = Json::array();
  std::vector<std::string> lines;
  for (const int64_t world : worlds) {
    for (const int64_t length : lengths) {
      const Workload w = target(like, world, length, FLAGS_rank);
      const StepMs exact = model.predict(demand_of(target(like, world, length, exact_rank))),
                   low = model.predict(demand_of(w));
      const auto share = [](const StepMs& ms) { return (ms.exposed + ms.gradients) / ms.total(); };
      const double tokens_per_second = static_cast<double>(w.sequences * length) / low.total() *
                                       1e3;
      table.push_back({std::to_string(world), std::to_string(length), format("%.4g", exact.total()),
                       format("%.1f %%", 100 * share(exact)), format("%.4g", low.total()),
                       format("%.1f %%", 100 * share(low)),
                       format("%.2f", exact.total() / low.total()),
                       format("%.4g", tokens_per_second)});
      rows.push_back({{"world_size", world},
                      {"tp", w.shape.tp},
                      {"cp", w.shape.cp},
                      {"dp", w.shape.dp},
                      {"seq_len", length},
                      {"sequences_per_step", w.sequences},
                      {"exact_ms", exact.total()},
                      {"exact_exposed_share", share(exact)},
                      {"lowrank_ms", low.total()},
                      {"lowrank_exposed_share", share(low)},
                      {"speedup", exact.total() / low.total()},
                      {"tokens_per_second", tokens_per_second}});
    }
    const int64_t from = pays_from(model, like, world);
    lines.push_back(c10::str(world, " processes: ",
                             from > 0 ? c10::str("low rank pays from L = ", from, " on")
                                      : "low rank pays at no length up to 1048576"));
    crossings.push_back({{"world_size", world}, {"pays_from", from > 0 ? Json(from) : Json()}});
  }
  print_table(std::cout, table);
  for (const std::string& line : lines) {
    std::cout << line << "\n";
  }
  return {{"node_size", first.processes_per_node},
          {"extrapolated", notes},
          {"steps", rows},
          {"pays", crossings}};
}

}  // namespace

ExitCode model(const Environment&) {
  require("runs", FLAGS_runs);
  check(ErrorKind::kUsage, FLAGS_scaling == "weak" || FLAGS_scaling == "strong",
        "--scaling must be weak or strong, got '", FLAGS_scaling, "'");
  check(ErrorKind::kUsage,
        FLAGS_tp >= 1 && FLAGS_cp >= 1 && FLAGS_sequences >= 1 && FLAGS_node_size >= 0,
        "--tp, --cp and --sequences must be at least 1, ", "--node_size not negative, got ",
        FLAGS_tp, ", ", FLAGS_cp, ", ", FLAGS_sequences, " and ", FLAGS_node_size);
  check(ErrorKind::kUsage, FLAGS_tolerance > 0 && FLAGS_gbps >= 0,
        "--tolerance must be positive and --gbps not negative, got ", FLAGS_tolerance, " and ",
        FLAGS_gbps);
  std::optional<std::string> setting;
  const Measured measured = read_files(FLAGS_runs, setting);
  check(ErrorKind::kUsage, !measured.workloads.empty(), "--runs=", FLAGS_runs,
        " has no run of drrl-bench scaling");
  StepModel model = StepModel::fit(measured.equations);
  const Measured held_out = read_files(FLAGS_validate, setting);

  print_banner(std::cout, "drrl-bench model",
               {{"measured on", *setting}, {"versions", version_line()}});
  std::cout << "\nfitted to\n";
  const auto [fitted, fit_error] = compare(model, measured.equations);
  Json json = provenance("model");
  json["measured_on"] = Json::parse(*setting);
  json["fit"] = {{"worst_error", fit_error}, {"runs", fitted}};
  bool good = true;
  if (!held_out.workloads.empty()) {
    std::cout << "\nheld out\n";
    std::vector<Equation> steps;
    std::copy_if(held_out.equations.begin(), held_out.equations.end(), std::back_inserter(steps),
                 [](const Equation& e) { return e.weight == 1; });
    const auto [rows, worst] = compare(model, steps);
    good = worst <= FLAGS_tolerance;
    std::cout << "largest error " << format("%.1f %%", 100 * worst)
              << (good ? ", within" : ", MORE than") << " the tolerance of "
              << format("%.1f %%", 100 * FLAGS_tolerance) << "\n";
    json["validation"] = {{"worst_error", worst},
                          {"tolerance", FLAGS_tolerance},
                          {"within_tolerance", good},
                          {"runs", rows}};
  }
  if (FLAGS_alpha_us >= 0) {
    model.costs[kNetworkMessage] = FLAGS_alpha_us / 1e3;
    model.sources[kNetworkMessage] = StepModel::Source::kGiven;
  }
  if (FLAGS_gbps > 0) {
    model.costs[kNetworkBytes] = 8 / FLAGS_gbps;
    model.sources[kNetworkBytes] = StepModel::Source::kGiven;
  }
  std::cout << "\ncosts\n";
  json["costs"] = print_costs(model);
  json["yardstick_ms"] = model.yardstick_ms;
  json["contention"] = model.contention;
  json["overlap"] = model.overlap;
  json["waiting"] = model.waiting;
  if (!FLAGS_worlds.empty()) {
    json["predictions"] = predict(model, measured);
  }
  if (!FLAGS_json.empty()) {
    write_text(FLAGS_json, json.dump(2) + "\n");
  }
  return good ? ExitCode::kSuccess : ExitCode::kUnexpected;
}

}  // namespace drrl::bench
