// drrl-bench collectives and scaling, and launch/bench/scaling.sh, as a user meets them.
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "launch/bench/bench.h"
#include "tests/launch/shell.h"
#include "tests/support/error_of.h"
#include "tests/support/io_support.h"

namespace drrl {
namespace {

using nlohmann::ordered_json;
using test::Ended;
using test::read_bytes;
using test::shell;
using test::TemporaryDirectory;

const std::string kBin = std::string(DRRL_BINARY_DIR) + "/bin";

std::string on(int64_t processes, const std::string& arguments) {
  return c10::str(DRRL_MPI_LINE, " -np ", processes, " ", kBin, "/drrl-bench ", arguments,
                  " --threads=1");
}

constexpr const char* kTiny =
    " --seq_len=64 --model_hidden=96 --model_layers=2 --model_heads=3 --model_kv_groups=3 "
    "--model_vocabulary=100 --steps=3 --warmup_steps=1";
constexpr const char* kLowRank = " --attention=lowrank --near_block=16 --sink_tokens=2 --rank=16";

class ScalingProgram : public testing::Test {
 protected:
  ordered_json run(int64_t processes, const std::string& arguments) {
    const auto path = own_ / "r.json";
    const Ended ended = shell(on(processes, arguments + " --json=" + path.string()));
    EXPECT_EQ(ended.code, 0) << ended.output;
    return ended.code == 0 ? ordered_json::parse(read_bytes(path)) : ordered_json();
  }

  static void expect_refused(const std::string& line, const std::vector<std::string>& fragments) {
    const Ended run = shell(line);
    EXPECT_EQ(run.code, 2) << line << "\n" << run.output;
    for (const std::string& fragment : fragments) {
      EXPECT_NE(run.output.find(fragment), std::string::npos) << "lacks: " << fragment << "\n"
                                                              << run.output;
    }
  }

  TemporaryDirectory own_;
};

TEST(CheckExact, NamesTheFirstWrongElement) {
  const at::Tensor expected = at::arange(6, at::kFloat);
  at::Tensor result = expected.clone();
  bench::check_exact("sum", result, expected);
  result[2] = 7;
  result[5] = NAN;
  EXPECT_EQ(
      error_of(ErrorKind::kCommunication, [&] { bench::check_exact("sum", result, expected); }),
      "sum: 2 of 6 elements are wrong, the first is element 2: 7 instead of 2");
}

TEST_F(ScalingProgram, CollectivesReportAsNcclTestsDo) {
  const std::map<int64_t, std::map<std::string, double>> factors = {{2,
                                                                     {{"all_reduce", 1},
                                                                      {"all_gather", 0.5},
                                                                      {"reduce_scatter", 0.5},
                                                                      {"broadcast", 1},
                                                                      {"all_to_all", 0.5}}},
                                                                    {3,
                                                                     {{"all_reduce", 4.0 / 3},
                                                                      {"all_gather", 2.0 / 3},
                                                                      {"reduce_scatter", 2.0 / 3},
                                                                      {"broadcast", 1},
                                                                      {"all_to_all", 2.0 / 3}}}};
  for (const auto& [processes, factor] : factors) {
    const auto json = run(processes,
                          "collectives --bytes=1,4000 --csv=" + (own_ / "r.csv").string());
    ASSERT_EQ(json["results"].size(), 10U);
    EXPECT_EQ(json["benchmark"], "collectives");
    EXPECT_EQ(json["launcher"], "mpirun");
    EXPECT_EQ(json["world_size"], processes);
    for (size_t i = 0; i < 10; ++i) {
      const auto& row = json["results"][i];
      EXPECT_EQ(row["members"], processes);
      EXPECT_EQ(row["bytes"], i % 2 == 0 ? 4 * processes : 4000 / (4 * processes) * 4 * processes)
          << row;
      EXPECT_EQ(row["count"].get<int64_t>() * 4, row["bytes"]) << row;
      EXPECT_GT(row["time_us"], 0) << row;
      EXPECT_NEAR(row["algbw_gb_s"].get<double>() * row["time_us"].get<double>() * 1e3 /
                      row["bytes"].get<double>(),
                  1, 1e-9)
          << row;
      EXPECT_NEAR(row["busbw_gb_s"].get<double>() / row["algbw_gb_s"].get<double>(),
                  factor.at(row["operation"]), 1e-9)
          << row;
    }
    const std::string csv = read_bytes(own_ / "r.csv");
    EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 11);
    EXPECT_TRUE(
        csv.starts_with("operation,members,bytes,count,type,time_us,algbw_gb_s,busbw_gb_s\n"))
        << csv;
  }
  const auto tp = run(
      2, "collectives --group=tp --tp=2 --operations=broadcast,all_reduce --bytes=2000000");
  ASSERT_EQ(tp["results"].size(), 2U);
  EXPECT_EQ(tp["group"], "tp");
}

TEST_F(ScalingProgram, ScalingCountsWhatAStepSendsAndWaitsFor) {
  for (const int64_t processes : {1, 2, 3}) {
    const auto json = run(processes, std::string("scaling") + kLowRank + kTiny);
    ASSERT_EQ(json["ranks"].size(), static_cast<size_t>(processes));
    EXPECT_EQ(json["world_size"], processes);
    EXPECT_EQ(json["dp"], processes);
    EXPECT_EQ(json["sequences_per_step"], 2 * processes);
    EXPECT_EQ(json["tokens_per_step"], 2 * processes * 64);
    EXPECT_NEAR(json["tokens_per_second"].get<double>() * json["step_ms"].get<double>() / 1e3,
                2.0 * static_cast<double>(processes) * 64, 1e-6);
    EXPECT_NEAR(json["steps_per_second"].get<double>() * json["step_ms"].get<double>(), 1e3, 1e-6);
    for (int64_t i = 0; i < processes; ++i) {
      const auto& rank = json["ranks"][static_cast<size_t>(i)];
      EXPECT_EQ(rank["dp_rank"], i);
      EXPECT_LE(rank["step_ms"], json["step_ms"]);
      EXPECT_GT(rank["basis_ms"], 0);
      EXPECT_GT(rank["basis_cpu_ms"], 0);
      EXPECT_LE(rank["basis_cpu_ms"],
                rank["basis_ms"].get<double>() + 1);  // of one thread; clocks differ in resolution
      EXPECT_LT(rank["basis_share"], 1);
      EXPECT_EQ(rank["basis_bytes"], 0);
      EXPECT_LT(rank["basis_ms"], rank["attention_forward_ms"]);
      if (processes == 1) {
        EXPECT_EQ(rank["exposed_ms"], 0);
        EXPECT_TRUE(rank["sent"].empty());
        continue;
      }
      EXPECT_GT(rank["exposed_share"], 0);
      EXPECT_LT(rank["exposed_share"], 1);
      // Gradients in one bucket, the step's sums, and nothing else in the groups of one.
      ASSERT_EQ(rank["sent"].size(), 1U) << rank;
      const auto n = static_cast<double>(processes);
      const double gradients = 2 * (n - 1) / n * 4 * json["parameters"].get<double>();
      EXPECT_EQ(rank["sent"][0]["operation"], "all_reduce");
      EXPECT_GE(rank["sent_bytes"], gradients);
      EXPECT_LT(rank["sent_bytes"], gradients + 2000);
      EXPECT_GE(rank["sent"][0]["calls"], 2);
    }
  }
}

TEST_F(ScalingProgram, EveryAxisHasItsGroup) {
  const auto groups_of = [](const ordered_json& json) {
    std::set<std::string> groups;
    for (const auto& sent : json["ranks"][0]["sent"]) {
      groups.insert(sent["group"]);
    }
    return groups;
  };
  const auto tp = run(2, std::string("scaling --scaling=strong --tp=2") + kTiny);
  EXPECT_EQ(tp["sequences_per_step"], 2);
  EXPECT_EQ(groups_of(tp), (std::set<std::string>{"tp"}));
  EXPECT_LT(tp["basis_share"], 0.01);  // exact attention has no bases
  const auto cp = run(2, std::string("scaling --scaling=strong --cp=2") + kLowRank + kTiny);
  EXPECT_EQ(groups_of(cp), (std::set<std::string>{"cp", "data"}));
  EXPECT_GT(cp["basis_share"], 0.01);
  EXPECT_EQ(tp["basis_bytes"], 0);
  EXPECT_GT(cp["basis_bytes"], 0);
  EXPECT_LT(cp["basis_bytes"], cp["sent_bytes"]);
}

TEST_F(ScalingProgram, ScriptComparesNumbersOfProcesses) {
  const auto out = own_ / "scaling.json";
  const std::string line = c10::str("DRRL_BIN=", kBin, " DRRL_LAUNCH='", DRRL_MPI_LINE,
                                    "' DRRL_PYTHON=", DRRL_PYTHON, " ", DRRL_SOURCE_DIR,
                                    "/launch/bench/scaling.sh");
  const Ended ended = shell(line + " --worlds=1,3 --axis=tp --out=" + out.string() + kTiny);
  ASSERT_EQ(ended.code, 0) << ended.output;
  EXPECT_NE(ended.output.find("efficiency"), std::string::npos) << ended.output;
  const auto json = ordered_json::parse(read_bytes(out));
  ASSERT_EQ(json["runs"].size(), 2U);
  ASSERT_EQ(json["efficiency"].size(), 2U);
  EXPECT_EQ(json["efficiency"][0]["efficiency"], 1);
  EXPECT_EQ(json["efficiency"][1]["world_size"], 3);
  EXPECT_EQ(json["efficiency"][1]["tp"], 3);
  const auto in_yardsticks = [](const ordered_json& run) {
    std::vector<double> times;
    for (const auto& step : run["steps"]) {
      times.push_back(step["ms"].get<double>() / step["yardstick_ms"].get<double>());
    }
    return bench::median(times);
  };
  const auto tokens = [](const ordered_json& run) { return run["tokens_per_step"].get<double>(); };
  EXPECT_NEAR(json["efficiency"][1]["efficiency"].get<double>(),
              tokens(json["runs"][1]) / 3 / in_yardsticks(json["runs"][1]) /
                  (tokens(json["runs"][0]) / in_yardsticks(json["runs"][0])),
              1e-9);

  // Runs that differ in more than their processes are not compared.
  std::vector<std::string> files;
  for (size_t i = 0; i < 2; ++i) {
    auto one = json["runs"][i];
    if (i == 1) {
      one["options"]["seq_len"] = "128";
    }
    files.push_back((own_ / c10::str(i, ".json")).string());
    test::write_bytes(files.back(), one.dump());
  }
  const std::string table = c10::str(DRRL_PYTHON, " ", DRRL_SOURCE_DIR,
                                     "/launch/bench/scaling_table.py ");
  expect_refused(table + out.string() + " " + files[0] + " " + files[1], {"differ in --seq_len"});
  expect_refused(line + " --worlds=1,x", {"--worlds", "1,x"});
  expect_refused(line + " --axis=pp", {"--axis", "pp"});
}

TEST_F(ScalingProgram, RefusesWhatMakesNoSense) {
  const std::string single = kBin + "/drrl-bench ";
  expect_refused(single + "collectives", {"--group=world is of one process"});
  expect_refused(on(2, "collectives --group=tp"), {"--group=tp is of one process", "--tp"});
  expect_refused(on(2, "collectives --group=pp"), {"'pp'"});
  expect_refused(on(2, "collectives --operations=all_reduce,scan --bytes=64"),
                 {"'scan'", "reduce_scatter"});
  expect_refused(on(2, "collectives --bytes=64k"), {"--bytes=64k"});
  expect_refused(on(2, std::string("scaling --scaling=strong --sequences=1") + kTiny),
                 {"--sequences=1", "2 data-parallel"});
  expect_refused(on(3, std::string("scaling --tp=2") + kTiny), {"3 processes", "--tp=2"});
  expect_refused(single + "scaling --scaling=fast", {"'fast'"});
  expect_refused(single + "scaling --attention=lowrank --rank_policy=dp",
                 {"--rank_policy=fixed", "dp"});
  expect_refused(single + "scaling --model_hidden=100 --model_heads=3",
                 {"--model_hidden=100", "--model_heads=3"});
  expect_refused(single + "scaling --warmup_steps=0", {"--warmup_steps"});
}

}  // namespace
}  // namespace drrl
