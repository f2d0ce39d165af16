// drrl-eval: perplexity of a language model under a rank policy, and what its attention cost. Options: drrl-eval --help.

#include "core/error.h"
#include "distributed/mesh.h"
#include "launch/console.h"
#include "launch/flags.h"
#include "launch/options.h"
#include "launch/policy_flags.h"
#include "launch/program.h"
#include "models/config.h"
#include "models/data.h"
#include "models/llama.h"
#include "core/storage.h"
#include "models/token_file.h"

#include <ATen/Parallel.h>
#include <gflags/gflags.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <iostream>

DEFINE_int64(max_tokens, 0, "stop after this many predicted tokens, rounded up to whole sequences; 0: all of --data [tokens]");
DEFINE_bool(compare_full, false, "evaluate every sequence with exact attention too, in turn, and report both");

namespace drrl {
namespace {

/// Sums over the sequences that a process evaluated under one policy.
struct Totals {
  double nll = 0;
  int64_t tokens = 0;
  AttentionStatistics attention;
};

/// The whole world's totals: losses over data-parallel ranks, operations and decisions over all, times of the slowest tensor-parallel rank.
Totals reduce(const Totals& mine, const Mesh& mesh) {
  auto losses = at::tensor({mine.nll, static_cast<double>(mine.tokens)}, at::kDouble);
  const AttentionStatistics& a = mine.attention;
  auto sums = at::tensor({a.flops, a.exact_flops, static_cast<double>(a.solves), static_cast<double>(a.updates), a.rank_qk, a.rank_v,
                          static_cast<double>(a.decisions)},
                         at::kDouble);
  auto times = at::tensor({a.attention_ms, a.solve_ms}, at::kDouble);
  mesh.dp().all_reduce(losses);
  mesh.world().all_reduce(sums);
  mesh.tp().all_reduce(times, ReduceOp::kMax);
  mesh.dp().all_reduce(times);
  const auto at_index = [](const at::Tensor& t, int64_t i) { return t[i].item<double>(); };
  Totals all;
  all.nll = at_index(losses, 0);
  all.tokens = std::llround(at_index(losses, 1));
  all.attention.flops = at_index(sums, 0);
  all.attention.exact_flops = at_index(sums, 1);
  all.attention.solves = std::llround(at_index(sums, 2));
  all.attention.updates = std::llround(at_index(sums, 3));
  all.attention.rank_qk = at_index(sums, 4);
  all.attention.rank_v = at_index(sums, 5);
  all.attention.decisions = std::llround(at_index(sums, 6));
  all.attention.attention_ms = at_index(times, 0);
  all.attention.solve_ms = at_index(times, 1);
  return all;
}

nlohmann::ordered_json result_json(const Totals& t, int64_t head_dim) {
  const double nll = t.nll / static_cast<double>(t.tokens);
  const AttentionStatistics& a = t.attention;
  const auto mean_rank = [&](double sum) { return a.decisions > 0 ? sum / static_cast<double>(a.decisions) : static_cast<double>(head_dim); };
  return {{"perplexity", std::exp(nll)},
          {"nll", nll},
          {"tokens", t.tokens},
          {"seq_len", FLAGS_seq_len},
          {"attention_flops_fraction", a.flops / a.exact_flops},
          {"attention_ms", a.attention_ms},
          {"refreshes", a.solves},
          {"basis_updates", a.updates},
          {"solves_ms", a.solve_ms},
          {"mean_rank_qk", mean_rank(a.rank_qk)},
          {"mean_rank_v", mean_rank(a.rank_v)}};
}

ExitCode evaluate(const Environment& environment) {
  require("model", FLAGS_model);
  require("data", FLAGS_data);
  check(ErrorKind::kUsage, FLAGS_max_tokens >= 0, "--max_tokens must not be negative, got ", FLAGS_max_tokens);
  const MeshShape shape = mesh_flags(environment);
  const at::Device device = device_flag(environment);
  const ModelConfig config = ModelConfig::load(FLAGS_model);
  check_seq_len(config);
  const auto file = std::make_shared<const TokenFile>(TokenFile::open(FLAGS_data));
  const SequenceDataset data(file, 0, file->tokens(), FLAGS_seq_len, FLAGS_seed);
  int64_t windows = data.windows();
  if (FLAGS_max_tokens > 0) {
    windows = std::min(windows, (FLAGS_max_tokens + FLAGS_seq_len - 1) / FLAGS_seq_len);
  }

  const Mesh mesh = Mesh::create(environment, shape, device, std::chrono::seconds(FLAGS_timeout_s));
  guarded(environment, [&] {
    const bool leader = environment.world_rank == 0;
    const AttentionSetup attention = attention_flags(config, mesh, device);
    const std::string description = attention.controller->describe();  // of the chosen policy, whatever is set later
    attention.controller->set_timing(true);
    CausalLM model(config, mesh.tp(), attention.controller, {.dtype = dtype_flag("dtype", FLAGS_dtype), .device = device});
    model.load(FLAGS_model);
    if (leader) {
      print_banner(std::cout, "drrl-eval",
                   {{"model", FLAGS_model},
                    {"data", c10::str(FLAGS_data, ": ", windows, " sequences of ", FLAGS_seq_len)},
                    {"parallel", c10::str("tensor ", shape.tp, " x data ", shape.dp)},
                    {"attention", description},
                    {"versions", version_line()}});
    }

    const std::shared_ptr<RankPolicy> chosen = attention.controller->policy();
    const std::shared_ptr<RankPolicy> full = make_full_policy();
    Totals policy_totals, full_totals;
    const auto run = [&](const Batch& batch, const std::shared_ptr<RankPolicy>& policy, Totals& totals) {
      attention.controller->set_policy(policy);
      attention.controller->take_statistics();
      const at::Tensor nll = model.token_nll(batch.tokens, batch.labels);
      totals.attention += attention.controller->take_statistics();
      totals.nll += nll.sum(at::kDouble).item<double>();
      totals.tokens += batch.labels.numel();
    };
    for (int64_t window = mesh.dp().rank(); window < windows; window += mesh.dp().size()) {
      const Batch batch = data.ordered(window, 1);
      // Exact attention first in every other sequence, so that neither profits from a warm cache.
      if (FLAGS_compare_full && window % 2 == 1) {
        run(batch, full, full_totals);
      }
      run(batch, chosen, policy_totals);
      if (FLAGS_compare_full && window % 2 == 0) {
        run(batch, full, full_totals);
      }
    }

    nlohmann::ordered_json json = result_json(reduce(policy_totals, mesh), config.head_dim);
    if (FLAGS_compare_full) {
      const nlohmann::ordered_json exact = result_json(reduce(full_totals, mesh), config.head_dim);
      json["full_perplexity"] = exact["perplexity"];
      json["full_nll"] = exact["nll"];
      json["full_attention_ms"] = exact["attention_ms"];
    }
    json["guard_violations"] = nullptr;  // no guard is part of these policies
    json["attention"] = description;
    json["dtype"] = FLAGS_dtype;
    json["device"] = FLAGS_device;
    json["threads"] = at::get_num_threads();
    json["world_size"] = environment.world_size;
    json["tp"] = shape.tp;
    json["dp"] = shape.dp;
    json["versions"] = version_line();
    for (const Option& option : options()) {
      json["options"][option.name] = option.value;
    }
    if (leader) {
      std::cout << "perplexity " << json["perplexity"].get<double>() << " (" << json["tokens"] << " tokens), attention FLOPs "
                << json["attention_flops_fraction"].get<double>() << " of exact, mean ranks " << json["mean_rank_qk"].get<double>() << " / "
                << json["mean_rank_v"].get<double>() << ", attention " << json["attention_ms"].get<double>() << " ms of which solves "
                << json["solves_ms"].get<double>() << " ms\n";
      if (FLAGS_compare_full) {
        const double full_ppl = json["full_perplexity"].get<double>();
        std::cout << "exact attention: perplexity " << full_ppl << ", " << json["full_attention_ms"].get<double>() << " ms; this policy: perplexity "
                  << std::showpos << 100 * (json["perplexity"].get<double>() / full_ppl - 1) << std::noshowpos << " %, "
                  << json["full_attention_ms"].get<double>() / json["attention_ms"].get<double>() << " times as fast\n";
      }
      std::cout << std::flush;
      if (!FLAGS_json.empty()) {
        write_text(FLAGS_json, json.dump(2) + "\n");
      }
    }
    mesh.world().barrier();
  });
  return ExitCode::kSuccess;
}

}  // namespace
}  // namespace drrl

int main(int argc, char** argv) {
  return drrl::run_program(argc, argv, "drrl-eval: perplexity under a rank policy, and what attention cost.", &drrl::evaluate);
}
