// drrl-train as a user meets it: what it prints, writes and exits with.
#include "core/error.h"
#include "launch/exit_codes.h"
#include "models/llama.h"
#include "models/token_file.h"
#include "policy/attention.h"
#include "tests/launch/shell.h"
#include "tests/models/io_support.h"

#include <nlohmann/json.hpp>

#include <cctype>
#include <chrono>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <thread>

namespace drrl {
namespace {

using test::Ended;
using test::read_bytes;
using test::shell;
using test::TemporaryDirectory;
using test::write_bytes;

const std::string kTrain = std::string(DRRL_BINARY_DIR) + "/bin/drrl-train";

std::string mpirun(int ranks) {
  return std::string(DRRL_MPI_LINE) + " -np " + std::to_string(ranks) + " ";
}

constexpr const char* kConfig = R"({
  "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 48, "intermediate_size": 56,
  "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu", "initializer_range": 0.05})";

class TrainProgram : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new TemporaryDirectory;
    CausalLM model(ModelConfig::parse(kConfig, "tiny"), Group(), make_full_attention());
    model.initialize(5);
    model.save(*shared_ / "model");
    std::vector<std::vector<int64_t>> documents(1);
    for (int64_t i = 0; i < 3000; ++i) {
      documents[0].push_back((i % 3 == 0 ? 2 * i : i) % 13);
    }
    write_token_file(*shared_ / "text", documents);
    documents[0][2000] = 61;
    write_token_file(*shared_ / "foreign", documents);
    documents[0].resize(20);
    write_token_file(*shared_ / "short", documents);
  }
  static void TearDownTestSuite() { delete shared_; }

  static std::string command(const std::string& more = "") {
    return kTrain + " --model=" + (*shared_ / "model").string() + " --data=" + (*shared_ / "text").string() +
           " --seq_len=24 --micro_batch=2 --global_batch=4 --steps=6 --lr=1e-2 --min_lr=1e-3 --threads=1 " + more;
  }
  std::string output() const { return "--output=" + (own_ / "out").string() + " "; }

  static void expect_failure(const std::string& line, ExitCode code, const std::vector<std::string>& fragments) {
    const Ended run = shell(line);
    EXPECT_EQ(run.code, static_cast<int>(code)) << line << "\n" << run.output;
    for (const std::string& fragment : fragments) {
      EXPECT_NE(run.output.find(fragment), std::string::npos) << "lacks: " << fragment << "\n" << run.output;
    }
  }

  static TemporaryDirectory* shared_;
  TemporaryDirectory own_;
};

TemporaryDirectory* TrainProgram::shared_ = nullptr;

size_t count(const std::string& text, const std::string& what) {
  size_t n = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) {
    ++n;
  }
  return n;
}

TEST_F(TrainProgram, TrainsExportsAndReports) {
  const Ended run = shell(command(output() + "--valid_fraction=0.1 --json=" + (own_ / "result.json").string()));
  ASSERT_EQ(run.code, 0) << run.output;
  for (const char* text : {"parameters", "6 steps", "* --lr=0.01", "  --beta2=0.95", "step 1/6", "step 6/6",
                           "validation perplexity", "exported", "LibTorch", "eta 00:00:00"}) {
    EXPECT_NE(run.output.find(text), std::string::npos) << "lacks: " << text << "\n" << run.output;
  }
  EXPECT_EQ(run.output.find('\r'), std::string::npos) << "a progress bar belongs on a terminal only";
  EXPECT_EQ(count(run.output, "\nstep "), 6U);

  const auto json = nlohmann::json::parse(read_bytes(own_ / "result.json"));
  EXPECT_EQ(json["steps"], 6);
  EXPECT_LT(json["last_loss"], json["first_loss"]);
  EXPECT_LT(json["valid_ppl_after"], json["valid_ppl_before"]);
  EXPECT_EQ(json["options"]["global_batch"], "4");

  // What was exported can be trained on.
  CausalLM reloaded(ModelConfig::load(own_ / "out/hf"), Group(), make_full_attention());
  EXPECT_NO_THROW(reloaded.load(own_ / "out/hf"));
  const auto names = test::listing(own_ / "out/metrics");
  ASSERT_EQ(names.size(), 3U);
  EXPECT_TRUE(names[0].starts_with("events.out.tfevents."));
  EXPECT_EQ(names[1], "metrics.csv");
  EXPECT_EQ(test::listing(own_ / "out/checkpoints"), (std::vector<std::string>{"latest", "step-00000006"}));
}

TEST_F(TrainProgram, TwoProcessesPrintOnce) {
  const Ended run = shell(mpirun(2) + command(output()));
  ASSERT_EQ(run.code, 0) << run.output;
  EXPECT_NE(run.output.find("tensor 1 x data 2 x context 1 = 2 processes (mpirun)"), std::string::npos) << run.output;
  EXPECT_EQ(count(run.output, "step 3/6"), 1U) << run.output;
}

// Options of a model of several far pairs and its calibration, in a folder.
std::string calibrated_model(const TemporaryDirectory& folder, const std::filesystem::path& text) {
  const std::string longer = std::regex_replace(kConfig, std::regex("\"max_position_embeddings\": 64"), "\"max_position_embeddings\": 512");
  CausalLM model(ModelConfig::parse(longer, "tiny"), Group(), make_full_attention());
  model.initialize(5);
  model.save(folder / "model");
  const std::string common = " --model=" + (folder / "model").string() + " --data=" + text.string() + " --seq_len=257 --near_block=32 --sink_tokens=1 --threads=1 ";
  const Ended calibrated = shell(std::string(DRRL_BINARY_DIR) + "/bin/drrl-policy calibrate --calibration_tokens=514 --policy=" +
                                 (folder / "ranks.safetensors").string() + common);
  EXPECT_EQ(calibrated.code, 0) << calibrated.output;
  return common;
}

TEST_F(TrainProgram, TheBudgetMayBeOfMeasuredTime) {
  const std::string common = calibrated_model(own_, *shared_ / "text") + "--basis_updates=1 ";
  const std::string bin = std::string(DRRL_BINARY_DIR) + "/bin/", file = (own_ / "latency.json").string();
  const Ended measured = shell(bin + "drrl-bench latency --gates --latency=" + file + common + "--policy=" + (own_ / "ranks.safetensors").string());
  ASSERT_EQ(measured.code, 0) << measured.output;
  for (const char* text : {"one KV group at L = 257", "fitted to", "mixed", "wrote " }) {
    EXPECT_NE(measured.output.find(text), std::string::npos) << "lacks: " << text << "\n" << measured.output;
  }
  auto table = nlohmann::json::parse(read_bytes(file));
  EXPECT_GT(table["exact"]["pair"].get<double>() + table["exact"]["row"].get<double>() + table["exact"]["area"].get<double>(), 0.0);
  EXPECT_EQ(table["seq_len"], 257);
  EXPECT_FALSE(table["gated"].is_null());

  // So small a model gains no time by low rank: let exact attention be slow.
  table["exact"]["pair"] = 1e3;
  write_bytes(file, table.dump());
  const std::string dp = bin + "drrl-eval --attention=lowrank --rank_policy=dp --rank_budget=0.9 --latency=" + file + " --policy=" +
                         (own_ / "ranks.safetensors").string() + common;
  const Ended run = shell(dp + "--json=" + (own_ / "eval.json").string());
  ASSERT_EQ(run.code, 0) << run.output;
  const auto json = nlohmann::json::parse(read_bytes(own_ / "eval.json"));
  EXPECT_GT(json["latency_fraction"].get<double>(), 0.0);
  EXPECT_LE(json["latency_fraction"].get<double>(), 0.9);
  EXPECT_NE(json["attention"].get<std::string>().find("budget 0.9 of the forward ms of "), std::string::npos) << json["attention"];
  expect_failure(dp + "--near_block=16", ExitCode::kUsage, {"latency.json", "\"near_block\" is 32, expected 16"});
  expect_failure(dp + "--latency= --near_block=16", ExitCode::kUsage, {"ranks.safetensors was calibrated with --near_block=32 and --sink_tokens=1, these are 16 and 1"});
  expect_failure(dp + "--rank_policy=fixed --rank=4", ExitCode::kUsage, {"--latency needs", "fixed"});
  expect_failure(bin + "drrl-bench latency --latency=x --seq_len=127" + std::string(" --near_block=32 --head_dims=16"), ExitCode::kUsage, {"--seq_len=127", "--near_block=32"});
  expect_failure(bin + "drrl-bench latency --latency=x --head_dims=16,32", ExitCode::kUsage, {"--head_dims=16,32", "one shape"});
  expect_failure(bin + "drrl-bench latency", ExitCode::kUsage, {"--latency is required"});
}

// Three KV heads on four processes: the first two hold the same one.
TEST_F(TrainProgram, TensorParallelProcessesMayShareAKvHead) {
  const std::string common = calibrated_model(own_, *shared_ / "text");
  const std::string bin = std::string(DRRL_BINARY_DIR) + "/bin/";
  const std::string ranks = common + "--attention=lowrank --rank_policy=dp --rank_budget=0.9 --basis_updates=1 --policy=" + (own_ / "ranks.safetensors").string() + " ";
  const std::string steps = bin + "drrl-train --steps=10 --global_batch=2 --lr=1e-3 --min_lr=1e-4 --valid_fraction=0.1 " + ranks;
  const auto result = [&](const std::string& line) {
    const Ended run = shell(line + "--json=" + (own_ / "result.json").string());
    EXPECT_EQ(run.code, 0) << run.output;
    return nlohmann::json::parse(read_bytes(own_ / "result.json"));
  };
  const auto alone = result(steps), shared = result(mpirun(4) + steps + "--tp=4 ");
  for (const char* loss : {"first_loss", "last_loss", "valid_loss_before", "valid_loss_after"}) {
    EXPECT_NEAR(shared[loss].get<double>(), alone[loss].get<double>(), 1e-4 * alone[loss].get<double>()) << loss;
  }
  for (int64_t i = 0; i < 4; ++i) {
    const auto& process = shared["ranks"][static_cast<size_t>(i)];
    EXPECT_EQ(process["basis_bytes"] > 0, i < 2) << process;
    EXPECT_EQ(process["sent"].dump().find("\"kv\"") != std::string::npos, i < 2) << process;
  }
  const std::string of_four = mpirun(4) + bin;
  expect_failure(of_four + "drrl-train --tp=4 --steps=1 --global_batch=1 --policy_update_every=1 " + ranks, ExitCode::kUsage, {"--policy_update_every", "--tp=4", "3 KV heads"});
  expect_failure(of_four + "drrl-train --tp=4 --steps=1 --global_batch=1 --balance_every=1 " + ranks, ExitCode::kUsage, {"--balance_every", "--tp=4", "3 KV heads"});
  expect_failure(of_four + "drrl-policy calibrate --tp=4 --calibration_tokens=514 --policy=" + (own_ / "other").string() + common, ExitCode::kUsage, {"--tp=4", "3 KV heads"});
}

TEST_F(TrainProgram, TheRankPolicyLearnsOnTheWay) {
  const std::string common = calibrated_model(own_, *shared_ / "text");
  const std::string bin = std::string(DRRL_BINARY_DIR) + "/bin/", policy = (own_ / "ranks.safetensors").string();
  const std::string ranks = common + "--attention=lowrank --rank_policy=dp --rank_budget=0.9 --basis_updates=1 ";
  const Ended run = shell(mpirun(3) + bin + "drrl-train --tp=3 --steps=4 --global_batch=4 --valid_fraction=0 --policy_update_every=1 --policy_sample_rows=8 " + output() +
                          "--policy=" + policy + ranks + "--json=" + (own_ / "result.json").string());
  ASSERT_EQ(run.code, 0) << run.output;
  // What each process sent: activations, sums and clipping over tensor-parallel ones, rewards to rank 0 and factors from there.
  const auto processes = nlohmann::json::parse(read_bytes(own_ / "result.json"))["ranks"];
  ASSERT_EQ(processes.size(), 3U);
  for (int64_t i = 0; i < 3; ++i) {
    const auto& process = processes[static_cast<size_t>(i)];
    EXPECT_EQ(process["rank"], i);
    std::map<std::string, double> sent;
    double all = 0;
    for (const auto& row : process["sent"]) {
      sent[row["group"].get<std::string>() + " " + row["operation"].get<std::string>()] = row["sent_bytes"];
      all += row["sent_bytes"].get<double>();
    }
    EXPECT_NEAR(process["sent_bytes"].get<double>(), all, 1e-9 * all);
    EXPECT_GT(process["exposed_ms"], 0);
    EXPECT_EQ(process["basis_bytes"], 0);
    EXPECT_GT(sent["tp all_reduce"], 0) << process;
    ASSERT_TRUE(sent.contains("policy gather")) << process;
    EXPECT_EQ(sent["policy gather"] > 0, i != 0) << process;
    EXPECT_GT(sent["policy broadcast"], 0) << process;
  }
  std::istringstream lines(read_bytes(own_ / "out/metrics/metrics.jsonl"));
  nlohmann::json last;
  for (std::string line; std::getline(lines, line);) {
    last = nlohmann::json::parse(line);
  }
  EXPECT_EQ(last["policy_updates"], 3);
  EXPECT_GT(last["policy_distance"], 0.0);
  EXPECT_LE(last["policy_damage"], last["policy_damage_calibrated"]);
  const Ended evaluated = shell(bin + "drrl-eval --model=" + (own_ / "out/hf").string() + " --policy=" + (own_ / "out/policy.safetensors").string() +
                                std::regex_replace(ranks, std::regex("--model=\\S+"), ""));
  EXPECT_EQ(evaluated.code, 0) << evaluated.output;
  EXPECT_NE(evaluated.output.find("then 4 online updates on"), std::string::npos) << evaluated.output;
  const std::string fresh = (own_ / "fresh").string();
  expect_failure(bin + "drrl-train --steps=1 --output=" + fresh + " --policy=" + policy + ranks + "--rank_budget=0.01", ExitCode::kUsage, {"budget", "0.01"});
  EXPECT_FALSE(std::filesystem::exists(fresh + "/metrics")) << "of a run that was refused";
  expect_failure(bin + "drrl-train --steps=1 --policy_update_every=1 --attention=lowrank --rank_policy=fixed --rank=4" + common, ExitCode::kUsage,
                 {"--policy_update_every=1 needs --attention=lowrank and --rank_policy=dp or rl", "fixed"});
  const std::string balanced = bin + "drrl-train --steps=1 --balance_every=1 --policy=" + policy;
  expect_failure(balanced + ranks + "--rank_policy=fixed --rank=4", ExitCode::kUsage, {"--balance_every needs --attention=lowrank and --rank_policy=dp", "fixed"});
  expect_failure(balanced + ranks + "--policy_update_every=1", ExitCode::kUsage, {"--balance_every does not go with --policy_update_every"});
  expect_failure(mpirun(2) + balanced + ranks + "--cp=2", ExitCode::kUsage, {"--balance_every=1 does not go with --cp=2", "decide alike"});
  expect_failure(balanced + ranks + "--balance_damage=-1", ExitCode::kUsage, {"--balance_damage", "-1"});
  for (const char* speeds : {"1,x", "1,0", "1,1,1,1"}) {
    expect_failure(bin + "drrl-eval --balance_speeds=" + speeds + " --policy=" + policy + ranks, ExitCode::kUsage, {std::string("--balance_speeds=") + speeds});
  }
}

TEST_F(TrainProgram, ReadsAFlagFile) {
  write_bytes(own_ / "run.flags", "# a comment\n--steps=2\n");
  const Ended run = shell(command("--flagfile=" + (own_ / "run.flags").string()));
  EXPECT_EQ(run.code, 0) << run.output;
  EXPECT_NE(run.output.find("step 2/2"), std::string::npos) << run.output;
}

TEST_F(TrainProgram, BadUsage) {
  expect_failure(command("--bogus=1"), ExitCode::kUsage, {"bogus"});
  expect_failure(command("--lr=fast"), ExitCode::kUsage, {"lr", "fast"});
  expect_failure(command("stray"), ExitCode::kUsage, {"stray"});
  expect_failure(command("--flagfile=/nowhere.flags"), ExitCode::kUsage, {"/nowhere.flags"});
  expect_failure(kTrain, ExitCode::kUsage, {"--model is required"});
  expect_failure(command("--seq_len=65"), ExitCode::kUsage, {"65", "64", "positions"});
  expect_failure(command("--tp=2"), ExitCode::kUsage, {"1 processes", "--tp=2"});
  expect_failure(command("--global_batch=0"), ExitCode::kUsage, {"global_batch", "0"});
  expect_failure(command("--min_lr=1"), ExitCode::kUsage, {"min_lr", "0.01"});
  expect_failure(command("--train_tokens=100"), ExitCode::kUsage, {"--steps=6", "--train_tokens=100"});
  expect_failure(command("--attention=linear"), ExitCode::kUsage, {"linear"});
  expect_failure(command("--dtype=fp8"), ExitCode::kUsage, {"fp8"});
}

TEST_F(TrainProgram, BadUsageUnderMpirunIsSaidOnceAndHangsNobody) {
  const Ended run = shell(mpirun(3) + command("--bogus=1"));
  EXPECT_EQ(run.code, static_cast<int>(ExitCode::kUsage)) << run.output;
  EXPECT_EQ(count(run.output, "bogus"), 1U) << run.output;
  expect_failure(mpirun(7) + command("--tp=7"), ExitCode::kUsage, {"7", "6 attention heads"});
  expect_failure(mpirun(2) + command("--global_batch=1"), ExitCode::kUsage, {"global_batch = 1", "2 data-parallel"});
}

TEST_F(TrainProgram, BadInput) {
  const auto with = [](const std::string& model, const std::string& data) {
    return kTrain + " --seq_len=24 --steps=2 --model=" + model + " --data=" + data;
  };
  const std::string model = (*shared_ / "model").string();
  const std::string data = (*shared_ / "text").string();
  expect_failure(with("/nowhere", data), ExitCode::kModel, {"/nowhere"});
  expect_failure(with(model, "/nowhere"), ExitCode::kData, {"/nowhere"});
  expect_failure(with(model, (*shared_ / "foreign").string()), ExitCode::kData, {"foreign.bin", "61", "2000"});
  expect_failure(with(model, (*shared_ / "short").string()), ExitCode::kData, {"short.bin", "seq_len + 1 = 25"});

  std::filesystem::copy(model, own_ / "broken");
  std::filesystem::resize_file(own_ / "broken/model.safetensors", 1000);
  expect_failure(with((own_ / "broken").string(), data), ExitCode::kModel, {"model.safetensors"});
  write_bytes(own_ / "bad.bin", read_bytes(data + ".bin"));
  write_bytes(own_ / "bad.idx", read_bytes(data + ".idx").substr(0, 20));
  expect_failure(with(model, (own_ / "bad").string()), ExitCode::kData, {"bad.idx"});
}

TEST_F(TrainProgram, OneFailingRankEndsTheJobAtOnce) {
  const auto start = std::chrono::steady_clock::now();
  const std::string good = command();
  const std::string bad = std::regex_replace(good, std::regex("/text "), "/nowhere ");
  ASSERT_NE(good, bad);
  // One program, different data: rank 0 alone fails, then rank 1 alone; the other waits in a collective.
  const std::string launcher = std::string(DRRL_MPI_LINE) + " -np 1 ";
  expect_failure(launcher + bad + " : -np 1 " + good, ExitCode::kData, {"rank 0: data error", "nowhere"});
  expect_failure(launcher + good + " : -np 1 " + bad, ExitCode::kData, {"rank 1: data error", "nowhere"});
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

TEST_F(TrainProgram, AFullDiskEndsTheJobAndLeavesNoCheckpoint) {
  const std::string limited = "ulimit -f 40; ";  // blocks of 512 or 1024 bytes
  expect_failure(limited + command(output()), ExitCode::kStorage, {"storage error", "shard-tp0"});
  EXPECT_FALSE(std::filesystem::exists(own_ / "out/checkpoints/latest"));
}

TEST_F(TrainProgram, AFullFileSystem) {
  std::filesystem::create_directory(own_ / "small");
  const std::string mount = "mount -t tmpfs -o size=64k tmpfs " + (own_ / "small").string();
  if (shell(mount).code != 0) {
    GTEST_SKIP() << "cannot mount a small file system here";
  }
  expect_failure(command("--output=" + (own_ / "small/out").string()), ExitCode::kStorage, {"No space left on device"});
  EXPECT_FALSE(std::filesystem::exists(own_ / "small/out/checkpoints/latest"));
  EXPECT_EQ(shell("umount " + (own_ / "small").string()).code, 0);
}

// Before any work, and without a trace.
TEST_F(TrainProgram, OutputsThatCannotBeWrittenAreRefusedFirst) {
  const std::string nowhere = (own_ / "nowhere/x").string(), folder = own_.path().string(), bin = std::string(DRRL_BINARY_DIR) + "/bin/";
  const std::string common = " --model=" + (*shared_ / "model").string() + " --data=" + (*shared_ / "text").string() + " --seq_len=24 --threads=1 ";
  const auto refused = [&](const std::string& line, const std::string& flag, const std::string& why) {
    const Ended run = shell(line);
    EXPECT_EQ(run.code, static_cast<int>(ExitCode::kStorage)) << line << "\n" << run.output;
    EXPECT_NE(run.output.find(flag + ": "), std::string::npos) << run.output;
    EXPECT_NE(run.output.find(why), std::string::npos) << run.output;
    EXPECT_EQ(run.output.find("parameters"), std::string::npos) << "it came so far as the banner\n" << run.output;
  };
  write_bytes(own_ / "hf", "a file");
  write_bytes(own_ / "result.json", "old");
  const auto before = test::listing(own_.path());
  refused(command("--json=" + nowhere), "--json=" + nowhere, "No such file or directory");
  refused(mpirun(2) + command("--json=" + folder), "--json=" + folder, "is a folder");
  refused(command("--output=" + folder + " --json=" + (own_ / "result.json").string()), "--output=" + folder, "hf\" is not a folder");
  std::filesystem::create_directories(own_ / "out/hf/model.safetensors");
  refused(command(output()), "--output=" + (own_ / "out").string(), "model.safetensors\": it is a folder");
  std::filesystem::remove_all(own_ / "out");
  refused(mpirun(2) + command("--output=/proc/x"), "--output=/proc/x", "cannot create");
  for (const char* flag : {"json", "decisions"}) {
    refused(bin + "drrl-eval --attention=lowrank --rank=4 --near_block=8 --" + flag + "=" + nowhere + common, std::string("--") + flag + "=" + nowhere, "cannot create");
  }
  refused(bin + "drrl-policy calibrate --near_block=8 --policy=" + nowhere + common, "--policy=" + nowhere, "cannot create");
  refused(bin + "drrl-policy record --near_block=8 --policy=x --traces=" + nowhere + common, "--traces=" + nowhere, "cannot create");
  refused(bin + "drrl-bench latency --latency=" + nowhere, "--latency=" + nowhere, "cannot create");
  for (const char* flag : {"json", "csv", "plot"}) {
    refused(bin + "drrl-bench attention --" + flag + "=" + nowhere, std::string("--") + flag + "=" + nowhere, "cannot create");
  }
  expect_failure(bin + "drrl-bench attention --csv=" + folder + "/x --json=" + folder + "/./x", ExitCode::kUsage, {"--json names this file, too"});
  EXPECT_EQ(test::listing(own_.path()), before);
  EXPECT_EQ(read_bytes(own_ / "result.json"), "old");
}

TEST_F(TrainProgram, ResultsMayGoToStdoutOrADevice) {
  const std::string eval = std::string(DRRL_BINARY_DIR) + "/bin/drrl-eval --model=" + (*shared_ / "model").string() + " --data=" + (*shared_ / "text").string() +
                           " --seq_len=24 --max_tokens=24 --threads=1 --json=";
  const Ended run = shell("{ " + eval + "/dev/stdout; } 2>/dev/null");
  EXPECT_EQ(run.code, 0) << run.output;
  const size_t json = run.output.find("\n{");
  ASSERT_NE(json, std::string::npos) << run.output;
  EXPECT_TRUE(nlohmann::json::parse(run.output.substr(json)).contains("perplexity")) << run.output;
  EXPECT_EQ(shell(eval + "/dev/null").code, 0);
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
  expect_failure(eval + "/dev/full", ExitCode::kStorage, {"/dev/full", "No space left on device"});
}

TEST_F(TrainProgram, WarnsThatNothingIsKept) {
  const Ended run = shell(command("--steps=1"));
  EXPECT_EQ(run.code, 0) << run.output;
  EXPECT_LT(run.output.find("no --output: NOTHING OF THIS TRAINING WILL BE KEPT"), run.output.find("step 1/1")) << run.output;
  EXPECT_EQ(shell(command(output() + "--steps=1")).output.find("NOTHING"), std::string::npos);
}

TEST_F(TrainProgram, ResumesFromOneThatLatestDoesNotNameYet) {
  const std::string steps = command(output() + "--steps=4 --save_every=1 --keep=0 --valid_fraction=0 ");
  ASSERT_EQ(shell(steps).code, 0);
  std::filesystem::remove_all(own_ / "out/checkpoints/step-00000004");
  write_bytes(own_ / "out/checkpoints/latest", "step-00000002\n");
  const Ended run = shell(steps + "--resume");
  EXPECT_EQ(run.code, 0) << run.output;
  EXPECT_NE(run.output.find("resumed after step 3"), std::string::npos) << run.output;
  EXPECT_NE(run.output.find("which was saved after"), std::string::npos) << run.output;
}

TEST_F(TrainProgram, AModelThatDivergesStopsWithItsOwnCode) {
  expect_failure(mpirun(2) + command("--lr=1e30 --clip=0 --warmup_tokens=0 --min_lr=0"), ExitCode::kNumerics,
                 {"not finite", "before the update"});
}

/// Starts the program, waits until it has printed a step, sends the signal; returns how it ended.
Ended interrupt(const std::string& command, const std::string& signal) {
  return shell("out=$(mktemp); " + command +
               " > $out 2>&1 & pid=$!; "
               "for i in $(seq 600); do grep -q '^step ' $out && break; sleep 0.05; done; kill -" +
               signal + " $pid; wait $pid; code=$?; cat $out; rm -f $out; exit $code");
}

TEST_F(TrainProgram, SigtermSavesAndARestartGoesOnBitForBit) {
  const std::string many = " --steps=3000 --global_batch=4 --valid_fraction=0 ";
  const Ended stopped = interrupt("exec " + command(output() + many + "--resume"), "TERM");
  EXPECT_EQ(stopped.code, static_cast<int>(ExitCode::kInterrupted)) << stopped.output;
  EXPECT_NE(stopped.output.find("interrupted after step"), std::string::npos) << stopped.output;
  const std::string latest = read_bytes(own_ / "out/checkpoints/latest");
  EXPECT_TRUE(latest.starts_with("step-")) << latest;
  EXPECT_FALSE(std::filesystem::exists(own_ / "out/hf"));

  const Ended again = interrupt("exec " + command(output() + many + "--resume"), "INT");
  EXPECT_EQ(again.code, static_cast<int>(ExitCode::kInterrupted)) << again.output;
  EXPECT_NE(again.output.find("resumed after step"), std::string::npos) << again.output;
  EXPECT_GT(read_bytes(own_ / "out/checkpoints/latest"), latest);

  expect_failure(command(output() + many), ExitCode::kUsage, {"already holds checkpoints"});
  expect_failure(command(output() + many + "--resume --lr=2e-2"), ExitCode::kCheckpoint, {"lr: 0.01 -> 0.02"});

  std::filesystem::remove(own_ / "out/checkpoints/latest");
  expect_failure(command(output() + many), ExitCode::kUsage, {"already holds checkpoints"});
  const Ended found = interrupt("exec " + command(output() + many + "--resume"), "INT");
  EXPECT_EQ(found.code, static_cast<int>(ExitCode::kInterrupted)) << found.output;
  EXPECT_NE(found.output.find("resumed after step"), std::string::npos) << found.output;
}

TEST_F(TrainProgram, UnderMpirunSigusr1SavesAndStops) {
  const Ended run = interrupt("exec " + mpirun(2) + command(output() + " --steps=3000"), "USR1");
  EXPECT_EQ(run.code, static_cast<int>(ExitCode::kInterrupted)) << run.output;
  EXPECT_TRUE(std::filesystem::exists(own_ / "out/checkpoints/latest"));
}

TEST_F(TrainProgram, ASecondRunIsKeptOutOfAFolder) {
  // The second run, of two processes, is refused, the first one goes on; once it is killed, the next one starts at once from what it has saved.
  const Ended ended = shell("run='" + command("--output=out --steps=100000 --save_every=20 --valid_fraction=0 --resume") + "'; mpirun='" + mpirun(2) + "'; cd " +
                            own_.path().string() + R"(
exec 2>&1
prints() { for i in $(seq 600); do grep -q "^step *$2/" $1 && return; sleep 0.05; done; }
$run > log & first=$!
prints log 25
$mpirun $run; echo second $?
seen=$(wc -l < log); sleep 0.5; [ $(wc -l < log) -gt $seen ] && echo first goes on
kill -9 $first; $run > next & next=$!
prints next '[0-9]*'
kill -USR1 $next; wait $next; echo next $?
grep resumed next; echo $first was first)");
  std::smatch first;
  ASSERT_TRUE(std::regex_search(ended.output, first, std::regex("(\\d+) was first"))) << ended.output;
  for (const std::string& text : {std::string("second 6"), std::string("first goes on"), std::string("next 10"), std::string("resumed after step"),
                                  "is being written by another run, \"process " + first[1].str() + " on ", std::string("name another folder by --output")}) {
    EXPECT_NE(ended.output.find(text), std::string::npos) << "lacks: " << text << "\n" << ended.output;
  }
}

TEST_F(TrainProgram, OptionsPageIsUpToDate) {
  const std::string page = read_bytes(std::string(DRRL_SOURCE_DIR) + "/launch/OPTIONS.md");
  for (const char* program : {"drrl-train", "drrl-eval", "drrl-policy", "drrl-bench"}) {
    const Ended run = shell(std::string(DRRL_BINARY_DIR) + "/bin/" + program + " --help");
    EXPECT_EQ(run.code, 0) << run.output;
    const size_t start = run.output.find("| option");
    ASSERT_NE(start, std::string::npos) << run.output;
    const std::string table = run.output.substr(start);
    EXPECT_NE(page.find(table), std::string::npos) << "launch/OPTIONS.md does not hold the table of " << program << " --help:\n"
                                                   << table;
    EXPECT_EQ(count(table, " |  |\n"), 0U) << "every option has a meaning";
  }
}

/// Names after "--" in flag files.
std::set<std::string> flags_in(const std::string& text, const std::regex& pattern) {
  std::set<std::string> names;
  for (std::sregex_iterator found(text.begin(), text.end(), pattern), end; found != end; ++found) {
    names.insert((*found)[1]);
  }
  return names;
}

TEST_F(TrainProgram, FlagFilesKnowTheirFlags) {
  std::set<std::string> known = {"flagfile"};
  for (const char* program : {"drrl-train", "drrl-eval", "drrl-policy", "drrl-bench"}) {
    const auto names =
        flags_in(shell(std::string(DRRL_BINARY_DIR) + "/bin/" + program + " --help").output, std::regex(R"(\| --(\w+) \|)"));
    EXPECT_FALSE(names.empty()) << program;
    known.insert(names.begin(), names.end());
  }
  size_t seen = 0;
  for (const auto& item : std::filesystem::directory_iterator(std::string(DRRL_SOURCE_DIR) + "/configs")) {
    if (item.path().extension() == ".flags") {
      for (const std::string& flag : flags_in(read_bytes(item.path()), std::regex(R"((?:^|\n)--(\w+))"))) {
        EXPECT_TRUE(known.contains(flag)) << item.path() << " sets --" << flag;
        ++seen;
      }
    }
  }
  EXPECT_GT(seen, 0U);
}

}  // namespace
}  // namespace drrl
