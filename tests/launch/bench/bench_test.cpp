// drrl-bench: its helpers, and the program as a user meets it.
#include "launch/bench/bench.h"

#include <cmath>
#include <sstream>

#include <gflags/gflags.h>

#include "core/attention/exact_attention.h"
#include "core/attention/flops.h"
#include "core/attention/reference.h"
#include "core/io/safetensors.h"
#include "launch/bench/svg_plot.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/options/policy_flags.h"
#include "models/causal_lm/causal_lm.h"
#include "models/data/token_file.h"
#include "policy/attention/attention_controller.h"
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

TEST(BenchLists, AreParsedOrRefused) {
  EXPECT_EQ(parse_list("x", "1,20,3", 1), (std::vector<int64_t>{1, 20, 3}));
  EXPECT_EQ(bench::parse_ranks("x", "32,48/16"), (std::vector<Ranks>{{32, 32}, {48, 16}}));
  EXPECT_EQ(bench::to_string({32, 32}), "32");
  EXPECT_EQ(bench::to_string({48, 16}), "48/16");
  for (const char* bad : {"", "1,,2", "1,two", "1 ", "0", "-3", "1.5", "99999999999999999999"}) {
    EXPECT_NE(
        error_of(ErrorKind::kUsage, [&] { parse_list("seq_lens", bad, 1); }).find("--seq_lens"),
        std::string::npos)
        << bad;
  }
  for (const char* bad : {"", "/8", "8/", "8/x", "8/2/2"}) {
    EXPECT_NE(
        error_of(ErrorKind::kUsage, [&] { bench::parse_ranks("ranks", bad); }).find("--ranks"),
        std::string::npos)
        << bad;
  }
}

TEST(RankBuckets, AreTheDevicesOrTheUsers) {
  const gflags::FlagSaver saver;
  EXPECT_EQ(bucket_flags(at::Device(at::kCUDA, 0), 128), (std::vector<int64_t>{32, 64, 96, 128}));
  for (const char* list : {"8,24", "8,24,128"}) {
    FLAGS_rank_buckets = list;
    EXPECT_EQ(bucket_flags(at::kCPU, 128), (std::vector<int64_t>{8, 24, 128}));
  }
  for (const char* bad : {"0", "16,16", "32,16", "136", "128", "x"}) {
    FLAGS_rank_buckets = bad;
    EXPECT_NE(
        error_of(ErrorKind::kUsage, [] { bucket_flags(at::kCPU, 128); }).find("--rank_buckets"),
        std::string::npos)
        << bad;
  }
}

TEST(BenchTiming, InterleavesAndLeavesTheFirstRunOut) {
  std::string order;
  std::vector<bench::Work> work;
  for (const char name : {'a', 'b', 'c'}) {
    work.emplace_back([&order, name] { order += name; });
  }
  const auto ms = bench::interleaved_ms(work, 3, at::kCPU);
  EXPECT_EQ(order,
            "abc"
            "abc"
            "bca"
            "cab");
  ASSERT_EQ(ms.size(), 3U);
  EXPECT_EQ(ms[0].size(), 3U);
  EXPECT_EQ(bench::median({5, 1, 3}), 3);
  EXPECT_EQ(bench::median({4, 1, 3, 10}), 3.5);
}

TEST(BenchMemory, SeesWhatIsHeldBrieflyAndNotWhatWasFreedBefore) {
  const auto hold = [](int64_t bytes) { at::empty({bytes}, at::kByte).fill_(1); };
  hold(int64_t{200} << 20);
  const auto peak = bench::peak_bytes([&] { hold(int64_t{64} << 20); }, at::kCPU);
  if (!peak) {
    GTEST_SKIP() << "the kernel does not reset VmHWM here";
  }
  EXPECT_GT(*peak, int64_t{60} << 20);
  EXPECT_LT(*peak, int64_t{80} << 20);
}

TEST(BenchAttention, AllCompetitorsComputeAttention) {
  const bench::Inputs in = bench::random_inputs(4, 2, 70, 16, 1);
  const auto exact = reference::exact_attention(in.q, in.k, in.v);
  EXPECT_LT(bench::relative_error(bench::sdpa(in, true, false), exact), 1e-5);
  EXPECT_LT(bench::relative_error(bench::sdpa(in, true, true), exact), 1e-5);
  EXPECT_GT(bench::relative_error(bench::sdpa(in, false, true), exact), 0.1);

  double share = 0, basis_ms = 0;
  EXPECT_LT(bench::relative_error(bench::lowrank(in, {16, 16}, {16, 2}, &share), exact), 1e-5);
  EXPECT_EQ(share, 1);
  const auto error = [&](int64_t rank) {
    return bench::relative_error(bench::lowrank(in, {rank, rank}, {16, 2}, &share, &basis_ms),
                                 exact);
  };
  EXPECT_GT(error(4), error(12));
  EXPECT_GT(error(12), 1e-3);
  EXPECT_GT(basis_ms, 0);
  const auto shorter = in.prefix(50);
  EXPECT_LT(bench::relative_error(bench::sdpa(shorter, true, true), exact.narrow(2, 0, 50)), 1e-5);
}

TEST(BenchOutput, CsvAndTable) {
  const ordered_json rows = {{{"a", 1}, {"b", nullptr}, {"c", "x y"}},
                             {{"a", 2.5}, {"b", true}, {"c", ""}}};
  EXPECT_EQ(bench::to_csv(rows), "a,b,c\n1,,x y\n2.5,true,\n");
  std::ostringstream out;
  bench::print_table(out, {{"L", "ms"}, {"1024", "7"}});
  EXPECT_EQ(out.str(), "   L  ms\n--------\n1024   7\n");
}

void expect_well_formed(const std::filesystem::path& svg) {
  const std::string script =
      "import sys, xml.dom.minidom as x; print(x.parse(sys.argv[1]).documentElement.tagName)";
  const Ended run = shell(std::string(DRRL_PYTHON) + " -c '" + script + "' '" + svg.string() + "'");
  EXPECT_EQ(run.output, "svg\n");
}

TEST(SvgPlot, IsWellFormedWhateverItIsGiven) {
  const TemporaryDirectory folder;
  const std::vector<std::vector<PlotLine>> cases = {
      {},
      {{"no points", {}}},
      {{"one <point> & more", {{1024, 1.5}}}},
      {{"a", {{512, 0.5}, {1000, 1}, {2048, 12.5}}}, {"b", {{512, std::nan("")}, {2048, 3}}}}};
  for (const auto& lines : cases) {
    const std::string svg = svg_plot("a < b", "x", "y", lines);
    test::write_bytes(folder / "plot.svg", svg);
    expect_well_formed(folder / "plot.svg");
    EXPECT_EQ(svg.find("nan"), std::string::npos);
    EXPECT_EQ(svg.find("inf"), std::string::npos);
  }
  const std::string svg = svg_plot("", "", "", cases.back());
  for (const char* tick : {">512<", ">1024<", ">2048<", ">10<"}) {
    EXPECT_NE(svg.find(tick), std::string::npos) << tick;
  }
}

constexpr const char* kConfig = R"({
  "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, )"
                                R"("hidden_size": 64, "intermediate_size": 56,
  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, )"
                                R"("max_position_embeddings": 128, "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu", )"
                                R"("initializer_range": 0.3})";

class BenchProgram : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new TemporaryDirectory;
    CausalLM model(ModelConfig::parse(kConfig, "tiny"), Group(), make_exact_attention());
    model.initialize(5);
    model.save(*shared_ / "model");
    std::vector<std::vector<int64_t>> documents(1);
    for (int64_t i = 0; i < 400; ++i) {
      documents[0].push_back(i * i % 61);
    }
    write_token_file(*shared_ / "text", documents);
  }
  static void TearDownTestSuite() { delete shared_; }

  static std::string command(const std::string& arguments) {
    return std::string(DRRL_BINARY_DIR) + "/bin/drrl-bench " + arguments +
           " --threads=1 --near_block=16 --sink_tokens=2";
  }
  static std::string real() {
    return " --model=" + (*shared_ / "model").string() + " --data=" + (*shared_ / "text").string() +
           " ";
  }

  static void expect_refused(const std::string& line, const std::vector<std::string>& fragments) {
    const Ended run = shell(line);
    EXPECT_EQ(run.code, 2) << line << "\n" << run.output;
    for (const std::string& fragment : fragments) {
      EXPECT_NE(run.output.find(fragment), std::string::npos) << "lacks: " << fragment << "\n"
                                                              << run.output;
    }
  }

  static TemporaryDirectory* shared_;
  TemporaryDirectory own_;
};

TemporaryDirectory* BenchProgram::shared_ = nullptr;

TEST_F(BenchProgram, AttentionMeasuresAndReports) {
  const Ended run = shell(
      command("attention --seq_lens=70,20 --head_dims=16,32 --heads=4 --kv_groups=2,1 "
              "--ranks=4,8/16,32 --json=" +
              (own_ / "r.json").string() + " --csv=" + (own_ / "r.csv").string() +
              " --plot=" + (own_ / "r.svg").string()));
  ASSERT_EQ(run.code, 0) << run.output;
  for (const char* text : {"random normal", "says nothing about a model", "lowrank 8/16",
                           "Grams + bases", "faster than SDPA from L ="}) {
    EXPECT_NE(run.output.find(text), std::string::npos) << "lacks: " << text << "\n" << run.output;
  }
  const auto json = ordered_json::parse(read_bytes(own_ / "r.json"));
  for (const char* key : {"benchmark", "date", "versions", "device", "threads", "dtype", "inputs",
                          "repeats", "options"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  EXPECT_FALSE(json["errors_are_meaningful"]);
  // Two lengths of two shapes; three exact competitors and two ranks at d = 16, three at d = 32.
  ASSERT_EQ(json["results"].size(), 2U * (5 + 6));
  EXPECT_EQ(json["crossover"].size(), 5U);
  for (const auto& row : json["results"]) {
    const bool low = !row["rank_qk"].is_null();
    EXPECT_GT(row["forward_ms"], 0) << row;
    EXPECT_GT(row["forward_backward_ms"], 0) << row;
    EXPECT_GT(row["forward_backward_speedup"], 0) << row;
    EXPECT_GT(row["flops_fraction"], 0) << row;
    const bool exact = !low || (row["rank_qk"] == 32 && row["rank_v"] == 32);
    EXPECT_EQ(row["error"].get<double>() < 1e-5, exact) << row;
    EXPECT_EQ(row["near_ms"].is_null(), exact) << row;
  }
  const auto first = json["results"][0];
  EXPECT_EQ(first["competitor"], "drrl exact");
  EXPECT_EQ(first["seq_len"], 20);
  EXPECT_EQ(first["heads"], 4);
  EXPECT_EQ(first["kv_groups"], 2);

  const std::string csv = read_bytes(own_ / "r.csv");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 1 + 2 * (5 + 6));
  EXPECT_TRUE(csv.starts_with("seq_len,head_dim,heads,kv_groups,competitor,")) << csv;
  expect_well_formed(own_ / "r.svg");
}

TEST_F(BenchProgram, AttentionTakesARealModelsInputs) {
  const Ended run = shell(command(
      "attention --seq_lens=64,128 --layer=1 --ranks=8 --backward=false --parts=false --json=" +
      (own_ / "r.json").string() + real()));
  ASSERT_EQ(run.code, 0) << run.output;
  EXPECT_EQ(run.output.find("says nothing"), std::string::npos) << run.output;
  const auto json = ordered_json::parse(read_bytes(own_ / "r.json"));
  EXPECT_TRUE(json["errors_are_meaningful"]);
  ASSERT_EQ(json["results"].size(), 8U);
  EXPECT_EQ(json["results"][0]["head_dim"], 16);
  EXPECT_TRUE(json["results"][3]["forward_backward_ms"].is_null());
}

TEST_F(BenchProgram, PeersAreComparedOnTheSameInputs) {
  const Ended run = shell(command(
      "peers --seq_len=100 --static_tokens=100 --ranks=4,12 --json=" + (own_ / "r.json").string() +
      " --dump=" + (own_ / "inputs.safetensors").string() + real()));
  ASSERT_EQ(run.code, 0) << run.output;
  const auto json = ordered_json::parse(read_bytes(own_ / "r.json"));
  ASSERT_EQ(json["results"].size(), 2U + 3 * 2);
  std::map<std::string, double> error, flops;
  for (const auto& row : json["results"]) {
    const std::string name = c10::str(row["method"].get<std::string>(), " ",
                                      row["size"].is_null() ? "-" : row["size"].get<std::string>());
    error[name] = row["error"];
    flops[name] = row["flops_fraction"];
    EXPECT_GE(row["worst_error"], row["error"]) << row;
    EXPECT_GT(row["ms"], 0) << row;
  }
  EXPECT_LT(error["SDPA -"], 1e-5);
  EXPECT_EQ(error["drrl exact -"], 0);
  for (const std::string method : {"static bases", "key-only PCA", "drrl"}) {
    EXPECT_GT(error[method + " 12"], 0);
    EXPECT_LT(error[method + " 12"], error[method + " 4"]) << method;
    EXPECT_LT(flops[method + " 4"], flops[method + " 12"]) << method;
  }
  EXPECT_LT(flops["static bases 4"], flops["key-only PCA 4"]);  // no Grams, no decompositions
  const SafetensorsFile dump(own_ / "inputs.safetensors");
  EXPECT_EQ(dump.entries().size(), 8U);
  EXPECT_EQ(dump.entry("layers.1.k").shape, (std::vector<int64_t>{1, 2, 100, 16}));
}

TEST_F(BenchProgram, BadUsage) {
  const std::string bin = std::string(DRRL_BINARY_DIR) + "/bin/drrl-bench";
  expect_refused(bin, {"usage: drrl-bench COMMAND", "attention", "peers"});
  expect_refused(bin + " speed", {"usage: drrl-bench COMMAND"});
  expect_refused(command("attention --bogus=1"), {"bogus"});
  expect_refused(command("attention --repeats=4"), {"--repeats", "4"});
  expect_refused(command("attention --seq_lens=64,x"), {"--seq_lens", "'x'"});
  expect_refused(command("attention --heads=3 --kv_groups=2"), {"3 heads", "2 KV groups"});
  expect_refused(command("attention --head_dims=16,32 --heads=1,2,3"), {"equally long"});
  expect_refused(command("attention --head_dims=16 --ranks=32"), {"--ranks=32", "16"});
  expect_refused(command("attention --dtype=fp8"), {"fp8"});
  expect_refused(command("attention --device=tpu"), {"tpu"});
  expect_refused(command("attention --heads=4" + real()), {"--heads", "--model"});
  expect_refused(command("attention --layer=2 --seq_lens=64" + real()), {"layer 2", "2 layers"});
  expect_refused(command("attention --layer=0 --seq_lens=129" + real()), {"129", "128 positions"});
  expect_refused(command("peers"), {"--model is required"});
  expect_refused(command("peers --seq_len=16 --static_tokens=64 --ranks=4" + real()),
                 {"--seq_len=16", "no far tokens"});
  expect_refused(command("peers --seq_len=64 --static_tokens=129 --ranks=4" + real()),
                 {"--static_tokens=129", "128"});
  expect_refused(command("peers --seq_len=64 --static_tokens=64 --ranks=16" + real()),
                 {"--ranks=16", "head dim of 16"});
  expect_refused(std::string(DRRL_MPI_LINE) + " -np 2 " + command("attention"), {"one process"});
  const Ended data = shell(command("peers --seq_len=64 --static_tokens=64 --ranks=4 --model=" +
                                   (*shared_ / "model").string() + " --data=/nowhere"));
  EXPECT_EQ(data.code, 4) << data.output;
}

}  // namespace
}  // namespace drrl
