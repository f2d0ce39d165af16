// drrl-bench model: what it counts, what it recovers from runs of known costs, what it refuses.
#include "launch/bench/scaling_model.h"

#include <cmath>

#include "core/attention/flops.h"
#include "core/linalg/least_squares.h"
#include "launch/bench/bench.h"
#include "tests/launch/shell.h"
#include "tests/support/error_of.h"
#include "tests/support/io_support.h"

namespace drrl::bench {
namespace {

using nlohmann::ordered_json;
using test::Ended;
using test::read_bytes;
using test::shell;
using test::TemporaryDirectory;

constexpr int64_t kHidden = 96, kLayers = 2, kHeads = 3, kGroups = 3, kVocabulary = 100,
                  kHeadDim = 32;

ordered_json config_json() {
  return {{"model_type", "llama"},          {"vocab_size", kVocabulary},
          {"hidden_size", kHidden},         {"intermediate_size", 3 * kHidden},
          {"num_hidden_layers", kLayers},   {"num_attention_heads", kHeads},
          {"num_key_value_heads", kGroups}, {"max_position_embeddings", 4096},
          {"tie_word_embeddings", true}};
}

Workload workload(MeshShape shape, int64_t seq_len, int64_t rank, int64_t sequences) {
  Workload w;
  w.config = ModelConfig::parse(config_json().dump(), "test");
  w.shape = shape;
  w.seq_len = seq_len;
  w.sequences = sequences;
  w.rank = rank;
  w.geometry = {32, 2};
  w.processes_per_node = w.world();
  w.cores_per_node = 2;
  return w;
}

/// Every kind of work and communication on up to four processes of a node of two cores, lengths and
/// batches that differ.
std::vector<Workload> many_workloads() {
  std::vector<Workload> all;
  for (const int64_t rank : {int64_t{16}, kHeadDim}) {
    for (const int64_t length : {256, 640, 1536}) {
      all.push_back(workload({}, length, rank, 1));
      all.push_back(workload({.dp = 2}, length, rank, 5));
      all.push_back(workload({.tp = 2}, length, rank, 2));
      all.push_back(workload({.cp = 2}, length, rank, 2));
      all.push_back(workload({.tp = 2, .dp = 2}, length, rank, 2));
    }
  }
  return all;
}

/// Costs of the size of real ones, but every one of them weighs in the workloads above.
StepModel known_model() {
  StepModel model;
  model.costs = {200, 2, 30, 20, 25, 100, 30, 40, 4, 0.5, 3, 0, 0};
  model.sources.fill(StepModel::Source::kMeasured);
  model.sources[kNetworkMessage] = model.sources[kNetworkBytes] = StepModel::Source::kUnknown;
  model.contention = 0.3;
  model.overlap = 0.5;
  model.waiting = 0.1;
  return model;
}

/// The file that drrl-bench scaling would write if steps took what the model says, on a machine
/// that is slower by `pace`, in three steps while that drifts and other things disturb two of them.
ordered_json run_json(const Workload& w, const StepModel& model, double pace = 1) {
  const auto step = [&](double drift, double disturbed) -> ordered_json {
    return {{"ms", disturbed * drift * pace * model.predict(demand_of(w)).total()},
            {"yardstick_ms", drift * pace * 40}};
  };
  const Demand demand = demand_of(w);
  Demand bases = demand;
  bases.amounts = bases.gradients = {};
  bases.amounts[kBases] = demand.amounts[kBases];
  const bool exact = w.rank == kHeadDim;
  return {{"benchmark", "scaling"},
          {"versions", "drrl"},
          {"device", "cpu"},
          {"cpu", "AVX2"},
          {"threads", 1},
          {"cores_per_node", w.cores_per_node},
          {"options",
           {{"attention", exact ? "exact" : "lowrank"},
            {"rank", std::to_string(w.rank)},
            {"seq_len", std::to_string(w.seq_len)},
            {"near_block", "32"},
            {"sink_tokens", "2"},
            {"basis_updates", "2"},
            {"policy", ""},
            {"dtype", "fp32"}}},
          {"processes_per_node", w.processes_per_node},
          {"tp", w.shape.tp},
          {"cp", w.shape.cp},
          {"dp", w.shape.dp},
          {"config", config_json()},
          {"sequences_per_step", w.sequences},
          {"steps", {step(0.5, 1.1), step(1, 1), step(1.5, 0.9)}},
          {"ranks",
           {{{"sent_bytes", demand.sent_bytes},
             {"basis_ms", exact ? 1e-3 : pace * model.predict(bases).total()}}}}};
}

TEST(LeastSquares, KeepsToNonnegative) {
  const auto x = nonnegative_least_squares({{1, 0}, {1, 1}, {1, 2}}, {1, 3, 5});
  EXPECT_NEAR(x[0], 1, 1e-6);
  EXPECT_NEAR(x[1], 2, 1e-6);
  EXPECT_EQ(nonnegative_least_squares({{1, 0}, {1, 1}}, {2, 1})[1], 0);
}

TEST(StepDemand, CountsWhatTheProcessWithTheMostWorkDoes) {
  const Demand one = demand_of(workload({}, 256, kHeadDim, 3));
  const double passes = 3 * kLayers;
  const double layer_weights = 4 * kHidden * kHidden + 3 * 3 * kHidden * kHidden,
               head = kVocabulary * kHidden;
  EXPECT_NEAR(one.amounts[kLinear], 3 * 6 * 256 * (kLayers * layer_weights + head) / 1e9, 1e-12);
  EXPECT_NEAR(one.amounts[kUpdate],
              (kLayers * (layer_weights + 2 * kHidden) + head + kHidden) / 1e6, 1e-12);
  EXPECT_EQ(one.amounts[kLayer], passes);
  EXPECT_NEAR(one.amounts[kExact],
              passes * exact_attention_flops(1, kHeads, 256, kHeadDim, true) / 1e9, 1e-12);
  EXPECT_EQ(one.amounts[kLowRank] + one.amounts[kBases] + one.amounts[kMessage] + one.sent_bytes,
            0);
  EXPECT_EQ(one.busy_others, 0);

  const Demand two_of_three = demand_of(workload({.tp = 2}, 256, kHeadDim, 3));  // KV groups: 2 + 1
  EXPECT_NEAR(two_of_three.amounts[kExact], one.amounts[kExact] * 2 / 3, 1e-12);
  EXPECT_LT(two_of_three.amounts[kUpdate], one.amounts[kUpdate] * 2 / 3 + 1e-3);
  EXPECT_EQ(two_of_three.busy_others, 1);
  EXPECT_EQ(two_of_three.cores_shared, 1);

  const Demand split = demand_of(workload({.cp = 2}, 256, kHeadDim, 3));
  EXPECT_NEAR(split.amounts[kSplitExact], one.amounts[kExact] / 2, 1e-12);
  EXPECT_EQ(split.amounts[kExact], 0);
  EXPECT_EQ(demand_of(workload({.dp = 4}, 256, kHeadDim, 4)).cores_shared, 2);
  EXPECT_FALSE(demand_of(workload({.dp = 4}, 256, kHeadDim, 4)).out_of_turn);
  EXPECT_TRUE(demand_of(workload({.tp = 2, .dp = 2}, 256, kHeadDim, 4)).out_of_turn);
  EXPECT_FALSE(demand_of(workload({.tp = 2}, 256, kHeadDim, 4)).out_of_turn);
  EXPECT_EQ(demand_of(workload({.dp = 2}, 256, kHeadDim, 3)).amounts[kLayer],
            2 * kLayers);  // 2 + 1 sequences

  // A sequence of one block has no far pairs; rank 16 is then exact attention too.
  EXPECT_GT(demand_of(workload({}, 34, 16, 1)).amounts[kExact], 0);
  EXPECT_EQ(demand_of(workload({}, 34, 16, 1)).amounts[kLowRank], 0);
  const Demand low = demand_of(workload({}, 1536, 16, 3)),
               full = demand_of(workload({}, 1536, kHeadDim, 3));
  EXPECT_LT(low.amounts[kLowRank], 0.7 * full.amounts[kExact]);
  EXPECT_GT(low.amounts[kBases], 0);
}

TEST(StepDemand, MessagesOfGroupsThatSpanNodesAreTheNetworks) {
  Workload w = workload({.tp = 2, .dp = 4}, 256, 16, 4);
  w.processes_per_node = 2;
  const Demand d = demand_of(w);
  EXPECT_GT(d.amounts[kBytes], 0);  // of --tp
  EXPECT_EQ(d.gradients[kBytes], 0);
  EXPECT_GT(d.gradients[kNetworkBytes], 0);
  EXPECT_EQ(d.gradients[kNetworkMessage], 4);  // one bucket, twice log2(4)
  EXPECT_EQ(d.cores_shared, 1);
}

TEST(StepModel, FitRecoversKnownCosts) {
  const StepModel known = known_model();
  std::vector<Equation> equations;
  for (const Workload& w : many_workloads()) {
    const Demand d = demand_of(w);
    equations.push_back({"", d, known.predict(d).total()});
  }
  for (const double bytes : {1e-3, 1.0, 20.0}) {  // all_to_all and all_reduce of two processes
    Demand d{.busy_others = 1};
    d.amounts[kMessage] = 1;
    d.amounts[kBytes] = bytes;
    equations.push_back({"", d, known.predict(d).total()});
    d.amounts[kMessage] = 2;
    d.amounts[kReduce] = bytes / 2;
    equations.push_back({"", d, known.predict(d).total()});
  }
  const StepModel fitted = StepModel::fit(equations);
  EXPECT_NEAR(fitted.contention, known.contention, 1e-9);
  EXPECT_NEAR(fitted.overlap, known.overlap, 1e-9);
  EXPECT_NEAR(fitted.waiting, known.waiting, 1e-9);
  for (size_t i = 0; i < kCostCount; ++i) {
    EXPECT_NEAR(fitted.costs[i], known.costs[i], 0.02 * known.costs[i]) << kCosts[i].key;
    EXPECT_EQ(fitted.sources[i], known.sources[i]) << kCosts[i].key;
  }
  const Demand larger = demand_of(workload({.tp = 2, .dp = 2, .cp = 2}, 2048, 16,
                                           8));  // another length, layout and number of processes
  EXPECT_NEAR(fitted.predict(larger).total() / known.predict(larger).total(), 1, 0.01);
}

TEST(StepModel, TakesTheMedianOfARunMeasuredAgain) {
  const Demand one{.hiding = 1}, other{.hiding = 2};
  const auto left = medians({{"a", one, 5},
                             {"b", one, 1},
                             {"a", one, 900},
                             {"a", other, 3},
                             {"a", one, 4},
                             {"b", one, 2}});
  ASSERT_EQ(left.size(), 3);
  EXPECT_EQ(left[0].ms, 5);
  EXPECT_EQ(left[1].ms, 1);
  EXPECT_EQ(left[2].ms, 3);
  // A machine half as fast: the yardstick takes twice as long.
  EXPECT_EQ(medians({{"a", one, 10, 1, 2}, {"a", one, 5, 1, 1.1}, {"a", one, 6, 1, 1}})[0].ms, 10);
}

TEST(StepModel, RefusesWhatRunsDoNotTell) {
  const StepModel known = known_model();
  const auto equations = [&](const std::vector<Workload>& workloads) {
    std::vector<Equation> all;
    for (const Workload& w : workloads) {
      all.push_back({"", demand_of(w), known.predict(demand_of(w)).total()});
    }
    return all;
  };
  // One length and layout: layers and linear layers grow alike.
  const auto alike = equations({workload({}, 256, kHeadDim, 1), workload({}, 256, kHeadDim, 2),
                                workload({}, 256, kHeadDim, 3), workload({}, 256, kHeadDim, 4)});
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { StepModel::fit(alike); })
                .find("do not tell the cost 'layer'"),
            std::string::npos);
  EXPECT_EQ(error_of(ErrorKind::kUsage, [&] { StepModel::fit({alike[0]}); }),
            "1 measured times for 4 costs: give more runs with --runs");
  const StepModel exact = StepModel::fit(
      equations({workload({}, 256, kHeadDim, 1), workload({}, 640, kHeadDim, 1),
                 workload({}, 640, kHeadDim, 4), workload({}, 1536, kHeadDim, 1),
                 workload({}, 1536, kHeadDim, 2)}));
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { exact.predict(demand_of(workload({}, 640, 16, 1))); })
                .find("'lowrank_attention'"),
            std::string::npos);
}

class ModelProgram : public testing::Test {
 protected:
  std::string write(const std::string& name, const ordered_json& json) {
    test::write_bytes(own_ / name, json.dump());
    return (own_ / name).string();
  }
  Ended model(const std::string& arguments) {
    return shell(std::string(DRRL_BINARY_DIR) +
                 "/bin/drrl-bench model --json=" + (own_ / "m.json").string() + " " + arguments);
  }
  /// As launch/bench/scaling.sh writes it.
  std::string write_runs() {
    ordered_json runs = ordered_json::array();
    double pace = 0.8;
    for (const Workload& w : many_workloads()) {
      runs.push_back(run_json(w, known_model(), pace));
      pace = pace < 1 ? 1 : pace > 1 ? 0.8 : 1.25;  // the median is 1
    }
    ordered_json collectives = {{"benchmark", "collectives"},
                                {"versions", "drrl"},
                                {"device", "cpu"},
                                {"cpu", "AVX2"},
                                {"threads", 1},
                                {"cores_per_node", 2},
                                {"group", "world"},
                                {"processes_per_node", 2},
                                {"options", {{"tp", "1"}, {"cp", "1"}}}};
    const Amounts& costs = known_model().costs;
    for (const double megabytes : {1e-3, 1.0, 20.0}) {
      const double exchanged = costs[kMessage] + costs[kBytes] * megabytes / 2;
      const double reduced = 2 * costs[kMessage] + costs[kBytes] * megabytes +
                             costs[kReduce] * megabytes / 2;
      collectives["results"].push_back({{"operation", "all_to_all"},
                                        {"members", 2},
                                        {"bytes", megabytes * 1e6},
                                        {"time_us", 1e3 * exchanged}});
      collectives["results"].push_back({{"operation", "all_reduce"},
                                        {"members", 2},
                                        {"bytes", megabytes * 1e6},
                                        {"time_us", 1e3 * reduced}});
    }
    return write("runs.json", {{"runs", runs}}) + "," + write("collectives.json", collectives);
  }

  TemporaryDirectory own_;
};

TEST_F(ModelProgram, FitsValidatesAndPredicts) {
  const std::string runs = write_runs();
  ordered_json held_out = run_json(workload({.tp = 2, .dp = 2}, 1024, 16, 4), known_model(), 3);
  const std::string right = write("right.json", held_out);
  for (ordered_json& step : held_out["steps"]) {
    step["ms"] = 1.5 * step["ms"].get<double>();
  }
  const std::string slow = write("slow.json", held_out);

  const Ended good = model("--runs=" + runs + " --validate=" + right +
                           " --worlds=8,64 --seq_lens=256,4096 --alpha_us=10 --gbps=100 --tp=2 "
                           "--sequences=1 --near_block=32 --sink_tokens=2 "
                           "--rank=16");
  ASSERT_EQ(good.code, 0) << good.output;
  EXPECT_NE(good.output.find("within the tolerance of 15.0 %"), std::string::npos) << good.output;
  const auto json = ordered_json::parse(read_bytes(own_ / "m.json"));
  EXPECT_LT(json["fit"]["worst_error"], 0.02);
  EXPECT_LT(json["validation"]["worst_error"], 0.02);
  EXPECT_NEAR(json["contention"], known_model().contention, 1e-9);
  EXPECT_NEAR(json["waiting"], known_model().waiting, 1e-9);
  EXPECT_NEAR(json["costs"]["linear"]["ms"], known_model().costs[kLinear], 0.5);
  EXPECT_EQ(json["costs"]["linear"]["source"], "measured");
  EXPECT_EQ(json["costs"]["network_message"]["source"], "given");
  EXPECT_NEAR(json["costs"]["network_message"]["ms"], 0.01, 1e-12);
  EXPECT_NEAR(json["costs"]["network_bytes"]["ms"], 0.08, 1e-12);  // a MB at 12.5 GB/s
  ASSERT_EQ(json["predictions"]["steps"].size(), 4U);
  const auto& last = json["predictions"]["steps"][3];
  EXPECT_EQ(last["dp"], 32);
  EXPECT_EQ(last["sequences_per_step"], 64);
  StepModel known = known_model();
  known.costs[kNetworkMessage] = 0.01;
  known.costs[kNetworkBytes] = 0.08;
  known.sources.fill(StepModel::Source::kGiven);
  for (const bool low : {false, true}) {
    Workload w = workload({.tp = 2, .dp = 32}, 4096, low ? 16 : kHeadDim, 64);
    w.processes_per_node = 2;
    EXPECT_NEAR(
        last[low ? "lowrank_ms" : "exact_ms"].get<double>() / known.predict(demand_of(w)).total(),
        1, 0.02);
  }
  EXPECT_EQ(json["predictions"]["pays"][0]["world_size"], 8);
  EXPECT_GT(json["predictions"]["pays"][0]["pays_from"], 64);
  EXPECT_LT(json["predictions"]["pays"][0]["pays_from"], 4096);
  EXPECT_GT(last["speedup"], 1);

  const Ended again = model("--runs=" + runs + " --validate=" + slow + "," + right + "," + right +
                            " --worlds=");
  EXPECT_EQ(again.code, 0) << "the median of three\n" << again.output;
  const Ended bad = model("--runs=" + runs + " --validate=" + slow + " --worlds=");
  EXPECT_EQ(bad.code, 1) << bad.output;
  EXPECT_NE(bad.output.find("MORE than the tolerance"), std::string::npos) << bad.output;
  EXPECT_FALSE(ordered_json::parse(read_bytes(own_ / "m.json"))["validation"]["within_tolerance"]
                   .get<bool>());
}

TEST_F(ModelProgram, RefusesFilesAndCasesThatItCannotUse) {
  const std::string runs = write_runs();
  const auto expect_refused = [&](const std::string& arguments,
                                  const std::vector<std::string>& fragments) {
    const Ended run = model(arguments);
    EXPECT_EQ(run.code, 2) << arguments << "\n" << run.output;
    for (const std::string& fragment : fragments) {
      EXPECT_NE(run.output.find(fragment), std::string::npos) << "lacks: " << fragment << "\n"
                                                              << run.output;
    }
  };
  const auto changed = [&](const std::string& name, auto&& change) {
    ordered_json json = run_json(workload({.dp = 2}, 640, 16, 2), known_model());
    change(json);
    return runs + "," + write(name, json);
  };
  expect_refused("", {"--runs is required"});
  expect_refused("--runs=" + (own_ / "none.json").string(), {"none.json"});
  test::write_bytes(own_ / "text.json", "not JSON");
  expect_refused("--runs=" + (own_ / "text.json").string(), {"text.json", "not a JSON object"});
  expect_refused("--runs=" + changed("a.json", [](auto& j) { j["benchmark"] = "attention"; }),
                 {"a.json", "drrl-bench attention"});
  expect_refused("--runs=" + changed("b.json", [](auto& j) { j.erase("config"); }),
                 {"b.json", "\"config\""});
  expect_refused("--runs=" + changed("c.json", [](auto& j) { j["cores_per_node"] = 64; }),
                 {"c.json", "cores_per_node", "64", "first file is 2"});
  expect_refused("--runs=" + changed("d.json", [](auto& j) { j["ranks"][0]["sent_bytes"] = 5; }),
                 {"d.json", "process 0 sent 5 bytes"});
  expect_refused("--runs=" + changed("e.json", [](auto& j) { j["steps"][1]["ms"] = "fast"; }),
                 {"e.json", "\"ms\""});
  expect_refused("--runs=" + changed("f.json", [](auto& j) { j["steps"].clear(); }),
                 {"f.json", "\"steps\" is \"[]\""});
  expect_refused("--runs=" + changed("g.json", [](auto& j) { j["steps"][0]["yardstick_ms"] = 0; }),
                 {"g.json", "yardstick_ms"});
  expect_refused("--runs=" + changed("h.json",
                                     [](auto& j) {
                                       for (auto& step : j["steps"]) {
                                         step["yardstick_ms"] = 0.7;
                                       }
                                     }),
                 {"its yardstick took 0.7 ms", "dp 2"});
  expect_refused("--runs=" + runs + " --rank=16", {"network_message", "--alpha_us"});
  expect_refused("--runs=" + runs + " --worlds=3 --tp=2 --rank=16", {"3 processes", "--tp=2"});
  expect_refused("--runs=" + runs + " --rank=32 --worlds=1", {"--rank=32", "[1, 32)"});
}

TEST_F(ModelProgram, CountsTheBytesThatRealRunsSend) {
  test::write_bytes(own_ / "lowrank.flags", "--near_block=32\n--sink_tokens=2\n--rank=16\n");
  const std::string
      tiny = " --seq_len=320 --flagfile=" + (own_ / "lowrank.flags").string() +
             " --model_hidden=96 --model_layers=2 --model_heads=3 --model_kv_groups=3"
             " --model_vocabulary=100 --steps=1 --warmup_steps=1 --threads=1 --json=" +
             (own_ / "r.json").string();
  for (const auto& [processes, arguments] :
       std::vector<std::pair<int64_t, std::string>>{{1, "--attention=lowrank"},
                                                    {4, "--attention=lowrank --tp=2 --cp=2"},
                                                    {3, "--cp=3"},
                                                    {3, "--attention=lowrank --cp=3"},
                                                    {4, "--tp=2 --scaling=strong"}}) {
    const Ended run = shell(c10::str(DRRL_MPI_LINE, " -np ", processes, " ", DRRL_BINARY_DIR,
                                     "/bin/drrl-bench scaling ", arguments, tiny));
    ASSERT_EQ(run.code, 0) << run.output;
    std::optional<std::string> setting;
    const Measured file = read_measured(own_ / "r.json", setting);  // throws if they are not
    ASSERT_EQ(file.workloads.size(), 1U);
    const auto json = ordered_json::parse(read_bytes(own_ / "r.json"));
    EXPECT_NEAR(file.equations[0].demand.sent_bytes, json["ranks"][0]["sent_bytes"].get<double>(),
                1)
        << arguments;
    EXPECT_EQ(file.equations[0].ms, json["step_ms"]);
    EXPECT_GT(file.equations[0].yardstick_ms, 0);
    EXPECT_EQ(file.workloads[0].world(), processes);
  }
  auto bad = ordered_json::parse(read_bytes(own_ / "r.json"));
  bad["steps"][0]["ms"] = std::nan("");
  const std::string message = error_of(ErrorKind::kUsage,
                                       [&] { write_measured(own_ / "bad.json", bad); });
  EXPECT_NE(message.find("bad.json\" was not written"), std::string::npos) << message;
  EXPECT_NE(message.find("\"ms\""), std::string::npos) << message;
  EXPECT_FALSE(std::filesystem::exists(own_ / "bad.json"));
}

}  // namespace
}  // namespace drrl::bench
