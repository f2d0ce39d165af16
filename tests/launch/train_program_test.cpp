// drrl-train as a user meets it: what it prints, writes and exits with.
#include <cctype>
#include <chrono>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <thread>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "launch/options/options.h"
#include "launch/runtime/exit_codes.h"
#include "models/causal_lm/causal_lm.h"
#include "models/data/token_file.h"
#include "policy/attention/attention_controller.h"
#include "policy/rank_policy.h"
#include "tests/launch/shell.h"
#include "tests/support/io_support.h"

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
  "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, )"
                                R"("hidden_size": 48, "intermediate_size": 56,
  "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, )"
                                R"("max_position_embeddings": 64, "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu", )"
                                R"("initializer_range": 0.05})";

class TrainProgram : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new TemporaryDirectory;
    CausalLM model(ModelConfig::parse(kConfig, "tiny"), Group(), make_exact_attention());
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
    return kTrain + " --model=" + (*shared_ / "model").string() +
           " --data=" + (*shared_ / "text").string() +
           " --seq_len=24 --micro_batch=2 --global_batch=4 --steps=6 --lr=1e-2 --min_lr=1e-3 "
           "--threads=1 " +
           more;
  }
  std::string output() const { return "--output=" + (own_ / "out").string() + " "; }

  static void expect_failure(const std::string& line, ExitCode code,
                             const std::vector<std::string>& fragments) {
    const Ended run = shell(line);
    EXPECT_EQ(run.code, static_cast<int>(code)) << line << "\n" << run.output;
    for (const std::string& fragment : fragments) {
      EXPECT_NE(run.output.find(fragment), std::string::npos) << "lacks: " << fragment << "\n"
                                                              << run.output;
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
  const Ended run = shell(
      command(output() + "--valid_fraction=0.1 --json=" + (own_ / "result.json").string()));
  ASSERT_EQ(run.code, 0) << run.output;
  for (const char* text :
       {"parameters", "6 steps", "* --lr=0.01", "  --beta2=0.95", "step 1/6", "step 6/6",
        "validation perplexity", "exported", "LibTorch", "eta 00:00:00"}) {
    EXPECT_NE(run.output.find(text), std::string::npos) << "lacks: " << text << "\n" << run.output;
  }
  EXPECT_EQ(run.output.find('\r'), std::string::npos)
      << "a progress bar belongs on a terminal only";
  EXPECT_EQ(count(run.output, "\nstep "), 6U);

  const auto json = nlohmann::json::parse(read_bytes(own_ / "result.json"));
  EXPECT_EQ(json["steps"], 6);
  EXPECT_LT(json["last_loss"], json["first_loss"]);
  EXPECT_LT(json["valid_ppl_after"], json["valid_ppl_before"]);
  EXPECT_EQ(json["options"]["global_batch"], "4");

  // What was exported can be trained on.
  CausalLM reloaded(ModelConfig::load(own_ / "out/hf"), Group(), make_exact_attention());
  EXPECT_NO_THROW(reloaded.load(own_ / "out/hf"));
  const auto names = test::listing(own_ / "out/metrics");
  ASSERT_EQ(names.size(), 3U);
  EXPECT_TRUE(names[0].starts_with("events.out.tfevents."));
  EXPECT_EQ(names[1], "metrics.csv");
  EXPECT_EQ(test::listing(own_ / "out/checkpoints"),
            (std::vector<std::string>{"latest", "step-00000006"}));
}

TEST_F(TrainProgram, TwoProcessesPrintOnce) {
  const Ended run = shell(mpirun(2) + command(output()));
  ASSERT_EQ(run.code, 0) << run.output;
  EXPECT_NE(run.output.find("tensor 1 x data 2 x context 1 = 2 processes (mpirun)"),
            std::string::npos)
      << run.output;
  EXPECT_EQ(count(run.output, "step 3/6"), 1U) << run.output;
}

// Options of a model of several far pairs and its calibration, in a folder.
std::string calibrated_model(const TemporaryDirectory& folder, const std::filesystem::path& text) {
  const std::string longer = std::regex_replace(
      kConfig, std::regex("\"max_position_embeddings\": 64"), "\"max_position_embeddings\": 512");
  CausalLM model(ModelConfig::parse(longer, "tiny"), Group(), make_exact_attention());
  model.initialize(5);
  model.save(folder / "model");
  const std::string common = " --model=" + (folder / "model").string() +
                             " --data=" + text.string() +
                             " --seq_len=257 --near_block=32 --sink_tokens=1 --threads=1 ";
  const Ended calibrated = shell(std::string(DRRL_BINARY_DIR) +
                                 "/bin/drrl-policy calibrate --calibration_tokens=514 --policy=" +
                                 (folder / "ranks.safetensors").string() + common);
  EXPECT_EQ(calibrated.code, 0) << calibrated.output;
  return common;
}

TEST_F(TrainProgram, TheBudgetMayBeOfMeasuredTime) {
  const std::string common = calibrated_model(own_, *shared_ / "text") + "--basis_updates=1 ";
  const std::string bin = std::string(DRRL_BINARY_DIR) + "/bin/",
                    file = (own_ / "latency.json").string();
  const Ended measured = shell(bin + "drrl-bench latency --gates --latency=" + file +
                               std::regex_replace(common, std::regex("--data=\\S+"), "") +
                               "--policy=" + (own_ / "ranks.safetensors").string());
  ASSERT_EQ(measured.code, 0) << measured.output;
  for (const char* text : {"one KV group at L = 257", "fitted to", "mixed", "wrote "}) {
    EXPECT_NE(measured.output.find(text), std::string::npos) << "lacks: " << text << "\n"
                                                             << measured.output;
  }
  auto table = nlohmann::json::parse(read_bytes(file));
  EXPECT_GT(table["exact"]["pair"].get<double>() + table["exact"]["row"].get<double>() +
                table["exact"]["area"].get<double>(),
            0.0);
  EXPECT_EQ(table["seq_len"], 257);
  EXPECT_FALSE(table["gated"].is_null());

  // So small a model gains no time by low rank: let exact attention be slow.
  table["exact"]["pair"] = 1e3;
  write_bytes(file, table.dump());
  const std::string
      dp = bin +
           "drrl-eval --attention=lowrank --rank_policy=dp --rank_budget=0.9 --latency=" + file +
           " --policy=" + (own_ / "ranks.safetensors").string() + common;
  const Ended run = shell(dp + "--json=" + (own_ / "eval.json").string());
  ASSERT_EQ(run.code, 0) << run.output;
  const auto json = nlohmann::json::parse(read_bytes(own_ / "eval.json"));
  EXPECT_GT(json["latency_fraction"].get<double>(), 0.0);
  EXPECT_LE(json["latency_fraction"].get<double>(), 0.9);
  EXPECT_NE(json["attention"].get<std::string>().find("budget 0.9 of the forward ms of "),
            std::string::npos)
      << json["attention"];
  expect_failure(dp + "--near_block=16", ExitCode::kUsage,
                 {"latency.json", "\"near_block\" is 32, expected 16"});
  expect_failure(dp + "--latency= --near_block=16", ExitCode::kUsage,
                 {"ranks.safetensors was calibrated with --near_block=32 and --sink_tokens=1, "
                  "these are 16 and 1: give those"});
  expect_failure(
      dp + "--rank_policy=fixed --rank=4", ExitCode::kUsage,
      {"--latency=" + file + " needs --rank_policy=random, greedy, dp or rl (is fixed)"});
  expect_failure(bin + "drrl-bench latency --latency=x --seq_len=127" +
                     std::string(" --near_block=32 --head_dims=16"),
                 ExitCode::kUsage, {"--seq_len=127", "--near_block=32"});
  expect_failure(bin + "drrl-bench latency --latency=x --head_dims=16,32", ExitCode::kUsage,
                 {"--head_dims=16,32", "one shape"});
  expect_failure(bin + "drrl-bench latency", ExitCode::kUsage, {"--latency is required"});
}

// Three KV heads on four processes: the first two hold the same one.
TEST_F(TrainProgram, TensorParallelProcessesMayShareAKvHead) {
  const std::string common = calibrated_model(own_, *shared_ / "text");
  const std::string bin = std::string(DRRL_BINARY_DIR) + "/bin/";
  const std::string
      ranks = common +
              "--attention=lowrank --rank_policy=dp --rank_budget=0.9 --basis_updates=1 --policy=" +
              (own_ / "ranks.safetensors").string() + " ";
  const std::string steps =
      bin + "drrl-train --steps=10 --global_batch=2 --lr=1e-3 --min_lr=1e-4 --valid_fraction=0.1 " +
      ranks;
  const auto result = [&](const std::string& line) {
    const Ended run = shell(line + "--json=" + (own_ / "result.json").string());
    EXPECT_EQ(run.code, 0) << run.output;
    return nlohmann::json::parse(read_bytes(own_ / "result.json"));
  };
  const auto alone = result(steps), shared = result(mpirun(4) + steps + "--tp=4 ");
  for (const char* loss : {"first_loss", "last_loss", "valid_loss_before", "valid_loss_after"}) {
    EXPECT_NEAR(shared[loss].get<double>(), alone[loss].get<double>(),
                1e-4 * alone[loss].get<double>())
        << loss;
  }
  for (int64_t i = 0; i < 4; ++i) {
    const auto& process = shared["ranks"][static_cast<size_t>(i)];
    EXPECT_EQ(process["basis_bytes"] > 0, i < 2) << process;
    EXPECT_EQ(process["sent"].dump().find("\"kv\"") != std::string::npos, i < 2) << process;
  }
  const std::string of_four = mpirun(4) + bin;
  expect_failure(
      of_four + "drrl-train --tp=4 --steps=1 --global_batch=1 --policy_update_every=1 " + ranks,
      ExitCode::kUsage, {"--policy_update_every", "--tp=4", "3 KV heads"});
  expect_failure(
      of_four + "drrl-train --tp=4 --steps=1 --global_batch=1 --balance_every=1 " + ranks,
      ExitCode::kUsage, {"--balance_every", "--tp=4", "3 KV heads"});
  expect_failure(of_four + "drrl-policy calibrate --tp=4 --calibration_tokens=514 --policy=" +
                     (own_ / "other").string() + common,
                 ExitCode::kUsage, {"--tp=4", "3 KV heads"});
}

TEST_F(TrainProgram, TheRankPolicyLearnsOnTheWay) {
  const std::string common = calibrated_model(own_, *shared_ / "text");
  const std::string bin = std::string(DRRL_BINARY_DIR) + "/bin/",
                    policy = (own_ / "ranks.safetensors").string();
  const std::string
      ranks = common + "--attention=lowrank --rank_policy=dp --rank_budget=0.9 --basis_updates=1 ";
  const Ended run = shell(mpirun(3) + bin +
                          "drrl-train --tp=3 --steps=4 --global_batch=4 --valid_fraction=0 "
                          "--policy_update_every=1 --policy_sample_rows=8 " +
                          output() + "--policy=" + policy + ranks +
                          "--json=" + (own_ / "result.json").string());
  ASSERT_EQ(run.code, 0) << run.output;
  // What each process sent: activations, sums and clipping over tensor-parallel ones, rewards to
  // rank 0 and factors from there.
  const auto processes = nlohmann::json::parse(read_bytes(own_ / "result.json"))["ranks"];
  ASSERT_EQ(processes.size(), 3U);
  for (int64_t i = 0; i < 3; ++i) {
    const auto& process = processes[static_cast<size_t>(i)];
    EXPECT_EQ(process["rank"], i);
    std::map<std::string, double> sent;
    double all = 0;
    for (const auto& row : process["sent"]) {
      sent[row["group"].get<std::string>() + " " +
           row["operation"].get<std::string>()] = row["sent_bytes"];
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
  const Ended evaluated = shell(bin + "drrl-eval --model=" + (own_ / "out/hf").string() +
                                " --policy=" + (own_ / "out/policy.safetensors").string() +
                                std::regex_replace(ranks, std::regex("--model=\\S+"), ""));
  EXPECT_EQ(evaluated.code, 0) << evaluated.output;
  EXPECT_NE(evaluated.output.find("then 4 online updates on"), std::string::npos)
      << evaluated.output;
  const std::string fresh = (own_ / "fresh").string();
  expect_failure(bin + "drrl-train --steps=1 --output=" + fresh + " --policy=" + policy + ranks +
                     "--rank_budget=0.01",
                 ExitCode::kUsage, {"budget", "0.01"});
  EXPECT_FALSE(std::filesystem::exists(fresh + "/metrics")) << "of a run that was refused";
  expect_failure(
      bin +
          "drrl-train --steps=1 --policy_update_every=1 --attention=lowrank --rank_policy=fixed "
          "--rank=4" +
          common,
      ExitCode::kUsage,
      {"--policy_update_every=1 needs --attention=lowrank and --rank_policy=dp or rl", "fixed"});
  const std::string balanced = bin + "drrl-train --steps=1 --balance_every=1 --policy=" + policy;
  expect_failure(balanced + common + "--attention=lowrank --rank_policy=fixed --rank=4",
                 ExitCode::kUsage,
                 {"--balance_every needs --attention=lowrank and --rank_policy=dp", "fixed"});
  expect_failure(balanced + ranks + "--policy_update_every=1", ExitCode::kUsage,
                 {"--balance_every does not go with --policy_update_every"});
  expect_failure(mpirun(2) + balanced + ranks + "--cp=2", ExitCode::kUsage,
                 {"--balance_every=1 does not go with --cp=2", "decide alike"});
  expect_failure(balanced + ranks + "--balance_damage=-1", ExitCode::kUsage,
                 {"--balance_damage", "-1"});
  for (const char* speeds : {"1,x", "1,0", "1,1,1,1"}) {
    expect_failure(bin + "drrl-eval --balance_speeds=" + speeds + " --policy=" + policy + ranks,
                   ExitCode::kUsage, {std::string("--balance_speeds=") + speeds});
  }
}

TEST_F(TrainProgram, ReadsFlagFiles) {
  const std::string file = (own_ / "run.flags").string(), other = (own_ / "other.flags").string();
  write_bytes(file, "# a comment\n\n  --steps=2 \r\n--flagfile=" + other);
  write_bytes(other, "--log_every=2\n--steps=3\n--noactivation_checkpoint\n");
  const auto expect_steps = [](const std::string& line, const std::string& last) {
    const Ended run = shell(line);
    EXPECT_EQ(run.code, 0) << run.output;
    EXPECT_NE(run.output.find("\nstep " + last), std::string::npos) << run.output;
  };
  expect_steps(command("--flagfile=" + file), "2/3");
  expect_steps(command("--flagfile " + other + "," + file + " --steps=4"), "4/4");
  // A pipe gives what it holds only once.
  expect_steps("mkfifo " + (own_ / "pipe").string() + "; (sleep 0.2; cat " + other + ") > " +
                   (own_ / "pipe").string() + " & " +
                   command("--flagfile=" + (own_ / "pipe").string()),
               "2/3");
}

TEST_F(TrainProgram, FlagFilesThatLoseOptionsAreRefused) {
  const auto expect_refused = [&](const std::string& text,
                                  const std::vector<std::string>& fragments) {
    write_bytes(own_ / "inner.flags", text);
    write_bytes(own_ / "run.flags", "--flagfile=" + (own_ / "inner.flags").string() + "\n");
    expect_failure(command("--flagfile=" + (own_ / "run.flags").string()), ExitCode::kUsage,
                   fragments);
  };
  expect_refused("--steps=1\n--sequence_lenght=8\n",
                 {"inner.flags:2: unknown option --sequence_lenght"});
  expect_refused("--steps\n", {"inner.flags:1: option 'steps' has no value"});
  expect_refused("steps=1\n", {"inner.flags:1: 'steps=1' is not an option"});
  expect_refused("--steps=1\n--flagfile=" + (own_ / "run.flags").string(),
                 {"inner.flags:2: --flagfile=", "run.flags", "include itself"});
  expect_refused("--flagfile=" + own_.path().string(),
                 {"--flagfile=" + own_.path().string() + " is a folder"});
  expect_refused("--flagfile=/dev/zero", {"--flagfile=/dev/zero is longer"});
  expect_refused("--flagfile=\n", {"inner.flags:1: --flagfile= names no file"});
  expect_refused(std::string("--steps=1\0--lr=2\n", 17), {"inner.flags is not a text"});
  write_bytes(own_ / "run.flags", "--steps=1\n");
  expect_failure(
      "FLAGS_flagfile=" + (own_ / "run.flags").string() + " " + command("--tryfromenv=flagfile"),
      ExitCode::kUsage, {"--flagfile must stand on the command line"});
  const std::string pipe = (own_ / "pipe").string();
  expect_failure("mkfifo " + pipe + "; " + command("--flagfile=" + pipe), ExitCode::kUsage,
                 {pipe + ": nothing came for 5 s"});
  expect_failure(mpirun(2) + command("--flagfile=" + pipe), ExitCode::kUsage,
                 {pipe + " is no regular file"});
}

TEST_F(TrainProgram, OptionsWithoutEffectAreRefused) {
  const std::string bin = std::string(DRRL_BINARY_DIR) + "/bin/";
  expect_failure(command("--rank=8"), ExitCode::kUsage,
                 {"--rank=8 needs --attention=lowrank (is exact)\n"});
  expect_failure(
      command(
          "--rank_policy=energy --gates --policy=p --rank_budget=0.5 --guard_eps=0.1 --energy=0.9 "
          "--latency=l --near_block=8 --sink_tokens=0 --basis_updates=1 --rank_buckets=8 "
          "--guard_decay=0.5 --valid_data=v --valid_fraction=0.1 --resume_override --save_every=2 "
          "--keep=3 --export_dtype=bf16 --policy_sample_rows=8 --balance_damage=1"),
      ExitCode::kUsage,
      {"--rank_policy=energy needs --attention=lowrank",
       "--gates=true needs --attention=lowrank (is exact) and --rank_policy=dp or rl (is energy)",
       "--policy=p needs", "--rank_budget=0.5 needs", "--guard_eps=0.1 needs", "--energy=0.9 needs",
       "--latency=l needs", "--near_block=8 needs", "--sink_tokens=0 needs",
       "--basis_updates=1 needs", "--rank_buckets=8 needs",
       "--valid_fraction=0.1 has no effect with --valid_data=v",
       "--resume_override=true needs --resume", "--save_every=2 needs --output",
       "--keep=3 needs --output", "--export_dtype=bf16 needs --output",
       "--policy_sample_rows=8 needs --policy_update_every",
       "--balance_damage=1 needs --balance_every"});
  expect_failure(command("--attention=lowrank --rank_policy=dp --policy=p --rank=8 --energy=0.9 "
                         "--guard_decay=0.5 --valid_fraction=0 --eval_every=1"),
                 ExitCode::kUsage,
                 {"--rank=8 needs --rank_policy=fixed (is dp)",
                  "--energy=0.9 needs --rank_policy=energy (is dp)",
                  "--guard_decay=0.5 needs --guard_eps", "--eval_every=1 needs --valid_fraction"});
  expect_failure(command("--attention=lowrank --gates --rank_budget=0.5"), ExitCode::kUsage,
                 {"--gates=true needs --rank_policy=dp or rl (is fixed)",
                  "--rank_budget=0.5 needs --rank_policy=random, greedy, dp or rl (is fixed)"});
  const std::string eval = bin + "drrl-eval --model=m --data=d ";
  expect_failure(eval +
                     "--prompt_tokens=8 --temperature=1 --top_k=3 --balance_damage=1 "
                     "--guard_decay=0.5 --seed=3",
                 ExitCode::kUsage,
                 {"--prompt_tokens=8 needs --generate", "--temperature=1 needs --generate",
                  "--top_k=3 needs --generate", "--balance_damage=1 needs --balance_speeds",
                  "--guard_decay=0.5 has no effect in drrl-eval", "--seed=3 needs"});
  expect_failure(eval + "--generate=3 --max_tokens=8 --compare_exact --seq_len=8 --top_k=3",
                 ExitCode::kUsage,
                 {"--max_tokens=8 has no effect with --generate=3",
                  "--compare_exact=true has no effect with --generate=3",
                  "--seq_len=8 has no effect with --generate=3", "--top_k=3 needs --temperature"});
  expect_failure(bin +
                     "drrl-policy calibrate --model=m --data=d --policy=p --json=j --held_out=2 "
                     "--gates --rank=8",
                 ExitCode::kUsage,
                 {"--json=j has no effect in drrl-policy calibrate", "--held_out=2 has",
                  "--gates=true has", "--rank=8 has"});
  expect_failure(bin +
                     "drrl-policy train --policy=p --traces=t --model=m --data=d "
                     "--calibration_tokens=8 --near_block=8",
                 ExitCode::kUsage,
                 {"--model=m has no effect in drrl-policy train", "--data=d has",
                  "--calibration_tokens=8 has", "--near_block=8 needs --latency"});
  expect_failure(bin + "drrl-bench collectives --ranks=8 --tp=2 --near_block=8", ExitCode::kUsage,
                 {"--ranks=8 has no effect in drrl-bench collectives",
                  "--tp=2 has no effect with --group=world", "--near_block=8 has"});
  expect_failure(bin + "drrl-policy --seq_len=8", ExitCode::kUsage,
                 {"usage: drrl-policy calibrate|record|train"});
  const Ended said = shell(mpirun(2) + command("--rank=8"));
  EXPECT_EQ(said.code, static_cast<int>(ExitCode::kUsage)) << said.output;
  EXPECT_EQ(count(said.output, "--rank=8 needs"), 1U) << said.output;
}

TEST_F(TrainProgram, OptionsWithoutEffectMayBeSwitchedOffOrStandInFlagFiles) {
  write_bytes(own_ / "shared.flags", "--rank=8\n--rank_policy=dp\n--gates\n--keep=3\n");
  const Ended run = shell(command("--steps=1 --flagfile=" + (own_ / "shared.flags").string() +
                                  " --guard_eps=0 --gates=false --policy= --valid_data=" +
                                  (*shared_ / "text").string() + " --valid_fraction=0"));
  EXPECT_EQ(run.code, 0) << run.output;
  EXPECT_NE(run.output.find("given, but without effect here: --gates --guard_eps --keep --policy "
                            "--rank --rank_policy\n"),
            std::string::npos)
      << run.output;
  EXPECT_EQ(run.output.find("--near_block"), std::string::npos) << run.output;
}

TEST_F(TrainProgram, SaysItsVersion) {
  for (const char* program : {"drrl-train", "drrl-policy", "drrl-bench", "drrl-bench model"}) {
    const Ended run = shell(c10::str(DRRL_BINARY_DIR, "/bin/", program, " --version"));
    EXPECT_EQ(run.code, 0) << run.output;
    EXPECT_TRUE(std::regex_match(run.output, std::regex("drrl \\d+\\.\\d+\\.\\d+, LibTorch .*\n")))
        << run.output;
  }
  EXPECT_EQ(shell(kTrain + " --helpxml").code, 0);
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
  expect_failure(command("--warmup_tokens=576"), ExitCode::kUsage,
                 {"--warmup_tokens=576", "[0, 576)", "-1"});
  expect_failure(command("--rank_plicy=dp"), ExitCode::kUsage,
                 {"unknown option --rank_plicy: did you mean --rank_policy?"});
  expect_failure(command("--learning-rate=1"), ExitCode::kUsage,
                 {"did you mean --lr or --min_lr?"});
  expect_failure(command("--train_tokens=100"), ExitCode::kUsage,
                 {"--steps=6", "--train_tokens=100"});
  expect_failure(command("--attention=linear"), ExitCode::kUsage, {"linear"});
  expect_failure(command("--dtype=fp8"), ExitCode::kUsage, {"fp8"});
}

TEST_F(TrainProgram, BadUsageUnderMpirunIsSaidOnceAndHangsNobody) {
  const Ended run = shell(mpirun(3) + command("--bogus=1"));
  EXPECT_EQ(run.code, static_cast<int>(ExitCode::kUsage)) << run.output;
  EXPECT_EQ(count(run.output, "bogus"), 1U) << run.output;
  expect_failure(mpirun(7) + command("--tp=7"), ExitCode::kUsage, {"7", "6 attention heads"});
  expect_failure(mpirun(2) + command("--global_batch=1"), ExitCode::kUsage,
                 {"global_batch = 1", "2 data-parallel"});
}

TEST_F(TrainProgram, BadInput) {
  const auto with = [](const std::string& model, const std::string& data) {
    return kTrain + " --seq_len=24 --steps=2 --model=" + model + " --data=" + data;
  };
  const std::string model = (*shared_ / "model").string();
  const std::string data = (*shared_ / "text").string();
  expect_failure(with("/nowhere", data), ExitCode::kModel, {"/nowhere", "hf download"});
  write_bytes(own_ / "book.txt", "In the beginning");
  expect_failure(with(model, (own_ / "book.txt").string()), ExitCode::kData,
                 {"book.txt", "not a token file", "prepare.py text"});
  expect_failure(with(model, "/nowhere"), ExitCode::kData, {"/nowhere"});
  expect_failure(with(model, (*shared_ / "foreign").string()), ExitCode::kData,
                 {"foreign.bin", "61", "2000"});
  expect_failure(with(model, (*shared_ / "short").string()), ExitCode::kData,
                 {"short.bin", "seq_len + 1 = 25"});

  std::filesystem::copy(model, own_ / "broken");
  std::filesystem::resize_file(own_ / "broken/model.safetensors", 1000);
  expect_failure(with((own_ / "broken").string(), data), ExitCode::kModel, {"model.safetensors"});
  write_bytes(own_ / "bad.bin", read_bytes(data + ".bin"));
  write_bytes(own_ / "bad.idx", read_bytes(data + ".idx").substr(0, 20));
  expect_failure(with(model, (own_ / "bad").string()), ExitCode::kData, {"bad.idx"});
}

// Sizes of 8 billion weights and none beside them: refused before anything is allocated, by every
// program that loads a model.
TEST_F(TrainProgram, AModelWithoutItsWeightsIsRefusedAtOnce) {
  std::string config = kConfig;
  for (const auto& [field, value] :
       {std::pair("vocab_size", 128256), std::pair("hidden_size", 4096),
        std::pair("intermediate_size", 14336), std::pair("num_hidden_layers", 32),
        std::pair("num_attention_heads", 32), std::pair("num_key_value_heads", 8)}) {
    config = std::regex_replace(config, std::regex(c10::str('"', field, "\": \\d+")),
                                c10::str('"', field, "\": ", value));
  }
  std::filesystem::create_directory(own_ / "large");
  write_bytes(own_ / "large/config.json", config);
  const std::string input = " --seq_len=24 --model=" + (own_ / "large").string() +
                            " --data=" + (*shared_ / "text").string();
  const std::string bin = std::string("ulimit -v 8000000; ") + DRRL_BINARY_DIR +
                          "/bin/";  // KiB: it would take 30 GB
  for (const char* program : {"drrl-train --steps=1", "drrl-eval",
                              "drrl-policy calibrate --near_block=8 --sink_tokens=1 --policy=x"}) {
    expect_failure(bin + program + input, ExitCode::kModel, {"large", "neither model.safetensors"});
  }
  std::filesystem::copy(*shared_ / "model/model.safetensors", own_ / "large/model.safetensors");
  expect_failure(bin + "drrl-eval" + input, ExitCode::kModel,
                 {"large/model.safetensors", "num_hidden_layers = 32"});
}

TEST_F(TrainProgram, TokensOfAnotherTokenizerAreRefused) {
  std::filesystem::copy(*shared_ / "model", own_ / "model");
  write_bytes(own_ / "model/tokenizer.json", R"({"model": {"vocab": {"b": 0, "a": 1}}})");
  for (const char* extension : {".bin", ".idx"}) {
    std::filesystem::copy((*shared_ / "text").string() + extension,
                          (own_ / "text").string() + extension);
  }
  write_bytes(own_ / "text.json",
              R"({"vocabulary": {"tokenizer": "their/tokenizer.json", "size": 2, "sha1": "0"}})");
  write_bytes(own_ / "questions.jsonl",
              R"({"id": "a", "context": [1, 2], "targets": [[3]], "answer": 0})");
  write_bytes(own_ / "questions.jsonl.json", read_bytes(own_ / "text.json"));
  const std::string bin = std::string(DRRL_BINARY_DIR) + "/bin/",
                    model = " --threads=1 --model=" + (own_ / "model").string();
  for (const char* program : {"drrl-train --steps=1", "drrl-eval",
                              "drrl-policy calibrate --near_block=8 --sink_tokens=1 --policy=x",
                              "drrl-bench attention --seq_lens=24 --layer=0"}) {
    expect_failure(bin + program +
                       (std::string(program).starts_with("drrl-bench") ? "" : " --seq_len=24") +
                       model + " --data=" + (own_ / "text").string(),
                   ExitCode::kData,
                   {"text", "text.json", "their/tokenizer.json", "model/tokenizer.json",
                    "prepare.py text --model"});
  }
  expect_failure(bin + "drrl-eval" + model + " --examples=" + (own_ / "questions.jsonl").string(),
                 ExitCode::kData, {"questions.jsonl.json", "their/tokenizer.json"});
}

TEST_F(TrainProgram, AnExportHoldsTheTokenizerOfItsModel) {
  const auto trained = [&](const std::string& tokenizer) {
    std::filesystem::remove_all(own_ / "model");
    std::filesystem::copy(*shared_ / "model", own_ / "model");
    write_bytes(own_ / "model/tokenizer.json", tokenizer);
    const Ended run = shell(std::regex_replace(command(output() + "--steps=1 --valid_fraction=0"),
                                               std::regex("--model=\\S+"),
                                               "--model=" + (own_ / "model").string()));
    EXPECT_EQ(run.code, 0) << run.output;
    std::filesystem::remove_all(own_ / "out/checkpoints");
    return read_bytes(own_ / "out/hf/tokenizer.json");
  };
  EXPECT_EQ(trained("{\"of\": \"A\"}"), "{\"of\": \"A\"}");
  write_bytes(own_ / "out/hf/model.safetensors.index.json", "{}");
  EXPECT_EQ(trained("{\"of\": \"B\"}"), "{\"of\": \"B\"}");
  EXPECT_FALSE(std::filesystem::exists(own_ / "out/hf/model.safetensors.index.json"));

  // What the export could not copy ends the run before its first step.
  std::filesystem::create_directory(own_ / "model/merges.txt");
  const Ended run = shell(std::regex_replace(command(output() + "--steps=1"),
                                             std::regex("--model=\\S+"),
                                             "--model=" + (own_ / "model").string()));
  EXPECT_EQ(run.code, static_cast<int>(ExitCode::kModel)) << run.output;
  EXPECT_NE(run.output.find("merges.txt"), std::string::npos) << run.output;
  EXPECT_EQ(run.output.find("step 1/1"), std::string::npos) << run.output;
}

TEST_F(TrainProgram, OneFailingRankEndsTheJobAtOnce) {
  const auto start = std::chrono::steady_clock::now();
  const std::string good = command();
  const std::string bad = std::regex_replace(good, std::regex("/text "), "/nowhere ");
  ASSERT_NE(good, bad);
  // One program, different data: rank 0 alone fails, then rank 1 alone; the other waits in a
  // collective.
  const std::string launcher = std::string(DRRL_MPI_LINE) + " -np 1 ";
  expect_failure(launcher + bad + " : -np 1 " + good, ExitCode::kData,
                 {"rank 0: data error", "nowhere"});
  expect_failure(launcher + good + " : -np 1 " + bad, ExitCode::kData,
                 {"rank 1: data error", "nowhere"});
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

// Two processes that were given different things end before the first step, and rank 0 says what
// differs.
TEST_F(TrainProgram, ProcessesThatWereGivenDifferentThingsDoNotTrainTogether) {
  const std::string launcher = std::string(DRRL_MPI_LINE) + " -np 1 ",
                    bin = std::string(DRRL_BINARY_DIR) + "/bin/";
  const auto differ = [&](const std::string& common, const std::string& first,
                          const std::string& second, const std::vector<std::string>& fragments) {
    const Ended run = shell(launcher + common + first + " : -np 1 " + common + second);
    EXPECT_EQ(run.code, static_cast<int>(ExitCode::kUsage)) << run.output;
    EXPECT_EQ(count(run.output, "need the same"), 1U) << run.output;
    EXPECT_EQ(count(run.output, "step 1/"), 0U) << run.output;
    EXPECT_NE(run.output.find("rank 0: usage error"), std::string::npos) << run.output;
    for (const std::string& fragment : fragments) {
      EXPECT_NE(run.output.find(fragment), std::string::npos) << "lacks: " << fragment << "\n"
                                                              << run.output;
    }
  };
  differ(
      command(), "--lr=1e-2 --clip=3", "--lr=2e-2 --clip=2",
      {"same options: --clip is 3 on rank 0, 2 on rank 1; --lr is 0.01 on rank 0, 0.02 on rank 1"});
  differ(command(), "--tp=2", "--tp=1", {"--tp is 2 on rank 0, 1 on rank 1"});
  differ(command(), "--json=" + (own_ / "a.json").string(), "",
         {"--json is given (", ") on rank 0, empty on rank 1"});
  const std::string model = " --model=" + (*shared_ / "model").string(),
                    data = " --data=" + (*shared_ / "text").string();
  differ(bin, "drrl-eval --seq_len=24" + model + data,
         "drrl-policy calibrate --seq_len=24 --policy=x" + model + data,
         {"the program is drrl-eval on rank 0, drrl-policy calibrate on rank 1"});

  // Copies on the nodes: of a text, and of weights of which each process reads its own half.
  for (const char* extension : {".bin", ".idx"}) {
    std::filesystem::copy(shared_->path() / ("text" + std::string(extension)),
                          own_ / ("text" + std::string(extension)));
  }
  std::filesystem::copy(*shared_ / "model", own_ / "model");
  const std::string copies = " --model=" + (own_ / "model").string() +
                             " --data=" + (own_ / "text").string();
  const std::string both = kTrain + " --seq_len=24 --steps=2 --global_batch=2 ";
  const Ended run = shell(launcher + both + model + data + " --threads=1 --timeout_s=60 : -np 1 " +
                          both + copies + " --threads=2");
  EXPECT_EQ(run.code, 0) << run.output;
  std::string bytes = read_bytes(own_ / "text.bin");
  bytes[100] ^= 1;
  write_bytes(own_ / "text.bin", bytes);
  differ(both + "--tp=2", model + data, copies,
         {"same inputs: the text of --data is 6000 bytes of checksum ", "text.bin) on rank 0",
          "text.bin) on rank 1"});
  bytes = read_bytes(own_ / "model/model.safetensors");
  bytes[bytes.size() - 1000] ^= 1;
  write_bytes(own_ / "model/model.safetensors", bytes);
  differ(both + "--tp=2" + data, model, " --model=" + (own_ / "model").string(),
         {"same inputs: the weights of --model is "});

  // One that fails alone is heard, and its code is the job's.
  expect_failure(launcher + command() + " : -np 1 " + command("--lr=fast"), ExitCode::kUsage,
                 {"fast"});
}

TEST_F(TrainProgram, RefusesLaunchersOfOtherMpis) {
  expect_failure("PMI_RANK=1 PMI_SIZE=2 " + command(), ExitCode::kUsage,
                 {"another MPI's launcher as rank 1 of 2"});
  const Ended alone = shell("PMI_RANK=0 PMI_SIZE=1 SLURM_NTASKS=8 " + command("--steps=1"));
  EXPECT_EQ(alone.code, 0) << alone.output;
  EXPECT_EQ(count(alone.output, "this process works alone, though SLURM_NTASKS=8"), 1U)
      << alone.output;
}

// Under torchrun through its store, before any GPU is needed.
TEST_F(TrainProgram, UnderTorchrunProcessesMustBeAlikeToo) {
  const std::string
      launcher = std::string(DRRL_PYTHON) +
                 " -m torch.distributed.run --standalone --nproc-per-node 2 --no-python bash -c ";
  const auto run = [&](const std::string& before, const std::string& options) {
    return shell("OMP_NUM_THREADS=1 " + launcher + "'" + before + " exec " +
                 command("--device=cuda " + options) + "'")
        .output;
  };
  std::string output = run("", "--lr=$((1 + RANK))");
  EXPECT_NE(output.find("--lr is 1 on rank 0, 2 on rank 1"), std::string::npos) << output;
  output = run("export WORLD_SIZE=$((2 + RANK));", "");
  EXPECT_TRUE(std::regex_search(
      output, std::regex("WORLD_SIZE=[23] of the process with RANK=[01], but [23] of one")))
      << output;
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
  expect_failure(command("--output=" + (own_ / "small/out").string()), ExitCode::kStorage,
                 {"No space left on device"});
  EXPECT_FALSE(std::filesystem::exists(own_ / "small/out/checkpoints/latest"));
  EXPECT_EQ(shell("umount " + (own_ / "small").string()).code, 0);
}

// Before any work, and without a trace.
TEST_F(TrainProgram, OutputsThatCannotBeWrittenAreRefusedFirst) {
  const std::string nowhere = (own_ / "nowhere/x").string(), folder = own_.path().string(),
                    bin = std::string(DRRL_BINARY_DIR) + "/bin/";
  const std::string common = " --model=" + (*shared_ / "model").string() +
                             " --data=" + (*shared_ / "text").string() +
                             " --seq_len=24 --threads=1 ";
  const auto refused = [&](const std::string& line, const std::string& flag,
                           const std::string& why) {
    const Ended run = shell(line);
    EXPECT_EQ(run.code, static_cast<int>(ExitCode::kStorage)) << line << "\n" << run.output;
    EXPECT_NE(run.output.find(flag + ": "), std::string::npos) << run.output;
    EXPECT_NE(run.output.find(why), std::string::npos) << run.output;
    EXPECT_EQ(run.output.find("parameters"), std::string::npos) << "it came so far as the banner\n"
                                                                << run.output;
  };
  write_bytes(own_ / "hf", "a file");
  write_bytes(own_ / "result.json", "old");
  const auto before = test::listing(own_.path());
  refused(command("--json=" + nowhere), "--json=" + nowhere, "No such file or directory");
  refused(mpirun(2) + command("--json=" + folder), "--json=" + folder, "is a folder");
  refused(command("--output=" + folder + " --json=" + (own_ / "result.json").string()),
          "--output=" + folder, "hf\" is not a folder");
  std::filesystem::create_directories(own_ / "out/hf/model.safetensors");
  refused(command(output()), "--output=" + (own_ / "out").string(),
          "model.safetensors\": it is a folder");
  std::filesystem::remove_all(own_ / "out");
  refused(mpirun(2) + command("--output=/proc/x"), "--output=/proc/x", "cannot create");
  for (const char* flag : {"json", "decisions"}) {
    refused(bin + "drrl-eval --attention=lowrank --rank=4 --near_block=8 --" + flag + "=" +
                nowhere + common,
            std::string("--") + flag + "=" + nowhere, "cannot create");
  }
  refused(bin + "drrl-policy calibrate --near_block=8 --policy=" + nowhere + common,
          "--policy=" + nowhere, "cannot create");
  refused(bin + "drrl-policy record --near_block=8 --policy=x --traces=" + nowhere + common,
          "--traces=" + nowhere, "cannot create");
  refused(bin + "drrl-bench latency --latency=" + nowhere, "--latency=" + nowhere, "cannot create");
  for (const char* flag : {"json", "csv", "plot"}) {
    refused(bin + "drrl-bench attention --" + flag + "=" + nowhere,
            std::string("--") + flag + "=" + nowhere, "cannot create");
  }
  expect_failure(bin + "drrl-bench attention --csv=" + folder + "/x --json=" + folder + "/./x",
                 ExitCode::kUsage, {"--json names this file, too"});
  // What a program reads is no output; a new --output may hold one.
  std::filesystem::copy(*shared_ / "model", own_ / "read");
  const std::string read = (own_ / "read/config.json").string();
  expect_failure(bin + "drrl-eval --json=" + read +
                     std::regex_replace(common, std::regex("--model=\\S+"),
                                        "--model=" + (own_ / "read").string()),
                 ExitCode::kUsage, {"--json=" + read + " would replace what --model reads"});
  std::filesystem::remove_all(own_ / "read");
  EXPECT_EQ(test::listing(own_.path()), before);
  const Ended inside = shell(command("--steps=1 --output=" + (own_ / "new").string() +
                                     " --json=" + (own_ / "new/result.json").string()));
  EXPECT_EQ(inside.code, 0) << inside.output;
  EXPECT_EQ(read_bytes(own_ / "result.json"), "old");
}

TEST_F(TrainProgram, ResultsMayGoToStdoutOrADevice) {
  const std::string eval = std::string(DRRL_BINARY_DIR) +
                           "/bin/drrl-eval --model=" + (*shared_ / "model").string() +
                           " --data=" + (*shared_ / "text").string() +
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
  EXPECT_LT(run.output.find("no --output: NOTHING OF THIS TRAINING WILL BE KEPT"),
            run.output.find("step 1/1"))
      << run.output;
  EXPECT_EQ(shell(command(output() + "--steps=1")).output.find("NOTHING"), std::string::npos);
}

TEST_F(TrainProgram, ResumesFromOneThatLatestDoesNotNameYet) {
  const std::string steps = command(output() +
                                    "--steps=4 --save_every=1 --keep=0 --valid_fraction=0 ");
  ASSERT_EQ(shell(steps).code, 0);
  std::filesystem::remove_all(own_ / "out/checkpoints/step-00000004");
  write_bytes(own_ / "out/checkpoints/latest", "step-00000002\n");
  const Ended run = shell(steps + "--resume");
  EXPECT_EQ(run.code, 0) << run.output;
  EXPECT_NE(run.output.find("resumed after step 3"), std::string::npos) << run.output;
  EXPECT_NE(run.output.find("which was saved after"), std::string::npos) << run.output;
}

TEST_F(TrainProgram, AModelThatDivergesStopsWithItsOwnCode) {
  expect_failure(mpirun(2) + command("--lr=1e30 --clip=0 --warmup_tokens=0 --min_lr=0"),
                 ExitCode::kNumerics, {"not finite", "before the update"});
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

  expect_failure(command(output() + many), ExitCode::kUsage,
                 {"already holds checkpoints", "--resume"});
  expect_failure(command(output() + many + "--resume --lr=2e-2"), ExitCode::kCheckpoint,
                 {"lr: 0.01 -> 0.02", "--resume_override"});

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
  // The second run, of two processes, is refused, the first one goes on; once it is killed, the
  // next one starts at once from what it has saved.
  const Ended ended = shell(
      "run='" + command("--output=out --steps=100000 --save_every=20 --valid_fraction=0 --resume") +
      "'; mpirun='" + mpirun(2) + "'; cd " + own_.path().string() + R"(
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
  ASSERT_TRUE(std::regex_search(ended.output, first, std::regex("(\\d+) was first")))
      << ended.output;
  for (const std::string& text :
       {std::string("second 6"), std::string("first goes on"), std::string("next 10"),
        std::string("resumed after step"),
        "is being written by another run, \"process " + first[1].str() + " on ",
        std::string("name another folder by --output")}) {
    EXPECT_NE(ended.output.find(text), std::string::npos) << "lacks: " << text << "\n"
                                                          << ended.output;
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

TEST_F(TrainProgram, OptionsPageIsUpToDate) {
  const std::string page = read_bytes(std::string(DRRL_SOURCE_DIR) + "/launch/OPTIONS.md");
  for (const char* program : {"drrl-train", "drrl-eval", "drrl-policy", "drrl-bench"}) {
    const Ended run = shell(std::string(DRRL_BINARY_DIR) + "/bin/" + program + " --helpmarkdown");
    EXPECT_EQ(run.code, 0) << run.output;
    ASSERT_NE(run.output.find("| option"), std::string::npos) << run.output;
    EXPECT_NE(page.find(run.output), std::string::npos)
        << "launch/OPTIONS.md does not hold the tables of " << program << " --helpmarkdown:\n"
        << run.output;
    EXPECT_EQ(count(run.output, " |  |\n"), 0U) << "every option has a meaning";
    EXPECT_EQ(run.output.find("### Other"), std::string::npos)
        << program << ": an option has no subject in launch/options/help.cpp\n"
        << run.output;
  }
}

TEST_F(TrainProgram, HelpIsWrappedAndNamesEveryOption) {
  for (const char* program : {"drrl-train", "drrl-eval", "drrl-policy", "drrl-bench"}) {
    const std::string call = std::string(DRRL_BINARY_DIR) + "/bin/" + program;
    const Ended help = shell(call + " --help");
    EXPECT_EQ(help.code, 0) << help.output;
    std::istringstream lines(help.output);
    for (std::string line; std::getline(lines, line);) {
      EXPECT_LE(line.size(), 80U) << program << ": " << line;
    }
    EXPECT_NE(help.output.find("Exit codes: 0 success"), std::string::npos) << help.output;
    const Ended table = shell(call + " --helpmarkdown");
    for (const std::string& name : flags_in(table.output, std::regex(R"(\| --(\w+) \|)"))) {
      EXPECT_NE(help.output.find("  --" + name + "="), std::string::npos) << program << " " << name;
    }
  }
}

TEST_F(TrainProgram, EveryOptionSaysWhereItHasAnEffect) {
  const std::map<std::string, std::vector<std::string>> commands = {
      {"drrl-train", {""}},
      {"drrl-eval", {""}},
      {"drrl-policy", {" calibrate", " record", " train"}},
      {"drrl-bench", {" attention", " latency", " peers", " collectives", " scaling", " model"}}};
  std::map<std::string, std::set<std::string>> options;  // of a command
  for (const auto& [program, words] : commands) {
    const auto names = flags_in(
        shell(std::string(DRRL_BINARY_DIR) + "/bin/" + program + " --helpmarkdown").output,
        std::regex(R"(\| --(\w+) \|)"));
    EXPECT_FALSE(names.empty()) << program;
    for (const std::string& word : words) {
      options[program + word] = names;
    }
  }
  std::set<std::string> listed;
  for (const OptionUse& use : option_uses()) {
    std::vector<std::string> where;
    for (const std::string& command : split(use.commands, ',')) {
      where.push_back(command.substr(command.find_first_not_of(' ')));
      EXPECT_TRUE(options.contains(where.back())) << use.options << ": no command " << where.back();
    }
    if (where.empty()) {
      for (const auto& [command, names] : options) {
        where.push_back(command);
      }
    }
    for (const std::string& command : where) {
      for (const std::string& name : split(use.options, ' ')) {
        EXPECT_TRUE(options[command].contains(name)) << command << " has no --" << name;
        listed.insert(name);
      }
      for (const std::string& condition : split(use.conditions, ' ')) {
        const size_t begin = condition[0] == '!' ? 1 : 0;
        EXPECT_TRUE(options[command].contains(condition.substr(begin, condition.find('=') - begin)))
            << command << ": " << condition;
      }
    }
  }
  for (const auto& [command, names] : options) {
    for (const std::string& name : names) {
      EXPECT_TRUE(listed.contains(name))
          << command << ": --" << name << " has no row in launch/options/option_uses.cpp";
    }
  }
}

TEST_F(TrainProgram, FlagFilesKnowTheirFlags) {
  std::set<std::string> known = {"flagfile"};
  for (const char* program : {"drrl-train", "drrl-eval", "drrl-policy", "drrl-bench"}) {
    const auto names = flags_in(
        shell(std::string(DRRL_BINARY_DIR) + "/bin/" + program + " --helpmarkdown").output,
        std::regex(R"(\| --(\w+) \|)"));
    EXPECT_FALSE(names.empty()) << program;
    known.insert(names.begin(), names.end());
  }
  size_t seen = 0;
  for (const auto& item :
       std::filesystem::directory_iterator(std::string(DRRL_SOURCE_DIR) + "/configs")) {
    if (item.path().extension() == ".flags") {
      for (const std::string& flag :
           flags_in(read_bytes(item.path()), std::regex(R"((?:^|\n)--(\w+))"))) {
        EXPECT_TRUE(known.contains(flag)) << item.path() << " sets --" << flag;
        ++seen;
      }
    }
  }
  EXPECT_GT(seen, 0U);
}

}  // namespace
}  // namespace drrl
