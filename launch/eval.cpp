// drrl-eval: perplexity of a language model under a rank policy, or its accuracy on examples, and
// what its attention cost; or text that it generates. Options: drrl-eval --help.

#include <algorithm>
#include <cmath>
#include <iostream>
#include <optional>
#include <vector>

#include <ATen/Parallel.h>
#include <gflags/gflags.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/io/file_io.h"
#include "distributed/topology/mesh.h"
#include "launch/eval/decisions.h"
#include "launch/options/balance_flags.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/options/policy_flags.h"
#include "launch/runtime/agreement.h"
#include "launch/runtime/console.h"
#include "launch/runtime/log.h"
#include "launch/runtime/program.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/config.h"
#include "models/causal_lm/generate.h"
#include "models/causal_lm/replicas.h"
#include "models/causal_lm/tokenizer.h"
#include "models/data/examples.h"
#include "models/data/sequence_dataset.h"
#include "models/data/token_file.h"
#include "policy/attention/audit.h"
#include "policy/attention/lowrank_controller.h"

DEFINE_int64(max_tokens, 0,
             "stop after this many predicted tokens, rounded up to whole sequences; 0: all of "
             "--data [tokens]");
DEFINE_bool(compare_full, false,
            "evaluate every sequence with exact attention too, in turn, and report both");
DEFINE_string(balance_speeds, "",
              "evaluate the ranks that balance chooses for tensor-parallel processes of these "
              "speeds, e.g. 1,0.5, whatever --tp is (drrl-train --balance_every); "
              "empty: those of --rank_budget");
DEFINE_int64(audit_rows, 0,
             "compare certified error bounds with exact attention for this many query tokens of "
             "each block, in one process; 0: no audit [tokens]");
DEFINE_string(decisions, "",
              "file for the ranks of every far pair and the share of entries that gates made "
              "exact, a JSON object for each sequence and layer, from one process");
DEFINE_string(ablate, "",
              "leave out, for a study: residual (of far log-sum-exps), mass (weights of keys and "
              "values in Grams), or both with a comma between");
DEFINE_int64(generate, 0,
             "instead of evaluating, continue the first --prompt_tokens of --data by this many; 0: "
             "evaluate [tokens]");
DEFINE_string(examples, "",
              "instead of evaluating --data, answer the questions of this file, a text with one or "
              "more a line, in JSON; launch/prepare/downstream_sets.py writes such files");
DEFINE_string(examples_out, "",
              "file for what became of each question of --examples, a JSON object a line");
DEFINE_int64(prompt_tokens, 64, "length of the prompt of --generate [tokens]");
DEFINE_double(temperature, 0,
              "of the draws of --generate, which --seed decides; 0: always the most likely token");
DEFINE_int64(top_k, 0, "draw only from this many most likely tokens; 0: from all [tokens]");

namespace drrl {
namespace {

/// Sums over the sequences that a process evaluated under one policy.
struct Totals {
  double nll = 0;
  int64_t tokens = 0;
  AttentionStatistics attention;
  std::vector<double> sequence_nll =
      {};  ///< mean of each sequence, 0 of those that other data-parallel ranks evaluate
};

/// What data-parallel ranks filled in, each its own places of the same list, zeros elsewhere.
std::vector<double> merge(const std::vector<double>& mine, const Mesh& mesh) {
  auto all = at::tensor(mine, at::kDouble);
  mesh.dp().all_reduce(all);
  return {all.const_data_ptr<double>(), all.const_data_ptr<double>() + all.numel()};
}

/// The whole world's totals: losses over data-parallel ranks, operations and decisions over all,
/// times of the slowest rank of those that share a sequence.
Totals reduce(const Totals& mine, const Mesh& mesh) {
  auto losses = at::tensor({mine.nll, static_cast<double>(mine.tokens)}, at::kDouble);
  const AttentionStatistics& a = mine.attention;
  auto sums = at::tensor(
      {a.flops, a.exact_flops, static_cast<double>(a.solves), static_cast<double>(a.updates),
       a.rank_qk, a.rank_v, static_cast<double>(a.decisions), static_cast<double>(a.guard_raises),
       static_cast<double>(a.context_bytes), static_cast<double>(a.context_exact_bytes),
       static_cast<double>(a.basis_bytes), static_cast<double>(a.exact_pairs)},
      at::kDouble);
  auto times = at::tensor({a.attention_ms, a.solve_ms}, at::kDouble);
  mesh.dp().all_reduce(losses);
  mesh.world().all_reduce(sums);
  mesh.tp().all_reduce(times, ReduceOp::kMax);
  mesh.cp().all_reduce(times, ReduceOp::kMax);
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
  all.attention.guard_raises = std::llround(at_index(sums, 7));
  all.attention.context_bytes = std::llround(at_index(sums, 8));
  all.attention.context_exact_bytes = std::llround(at_index(sums, 9));
  all.attention.basis_bytes = std::llround(at_index(sums, 10));
  all.attention.exact_pairs = std::llround(at_index(sums, 11));
  all.attention.attention_ms = at_index(times, 0);
  all.attention.solve_ms = at_index(times, 1);
  if (!mine.sequence_nll.empty()) {
    all.sequence_nll = merge(mine.sequence_nll, mesh);
    for (size_t i = 0; i < all.sequence_nll.size(); ++i) {
      check_loss(static_cast<int64_t>(i), all.sequence_nll[i]);
    }
  }
  return all;
}

double mean_rank(double sum, const AttentionStatistics& a, int64_t head_dim) {
  return a.decisions > 0 ? sum / static_cast<double>(a.decisions) : static_cast<double>(head_dim);
}

nlohmann::ordered_json attention_json(const AttentionStatistics& a, int64_t head_dim) {
  return {{"attention_flops_fraction", a.flops / a.exact_flops},
          {"attention_ms", a.attention_ms},
          {"refreshes", a.solves},
          {"basis_updates", a.updates},
          {"far_pairs", a.decisions},
          {"exact_pairs", a.exact_pairs},
          {"guard_violations",
           FLAGS_guard_eps > 0 ? nlohmann::ordered_json(a.guard_raises) : nlohmann::ordered_json()},
          {"solves_ms", a.solve_ms},
          {"context_bytes", a.context_bytes},
          {"context_exact_bytes", a.context_exact_bytes},
          {"basis_bytes", a.basis_bytes},
          {"mean_rank_qk", mean_rank(a.rank_qk, a, head_dim)},
          {"mean_rank_v", mean_rank(a.rank_v, a, head_dim)}};
}

nlohmann::ordered_json result_json(const Totals& t, int64_t head_dim) {
  const double nll = t.nll / static_cast<double>(t.tokens);
  nlohmann::ordered_json json = {{"perplexity", std::exp(nll)},
                                 {"nll", nll},
                                 {"tokens", t.tokens},
                                 {"sequence_nll", t.sequence_nll},
                                 {"seq_len", FLAGS_seq_len}};
  json.update(attention_json(t.attention, head_dim));
  return json;
}

std::vector<int64_t> to_vector(const at::Tensor& ids) {
  return {ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + ids.numel()};
}

/// Says how many pairs no low rank served.
void print_exact_pairs(const nlohmann::ordered_json& json) {
  if (const auto exact = json["exact_pairs"].get<int64_t>(); exact > 0) {
    std::cout << exact << " of " << json["far_pairs"]
              << " far pairs have exact scores or values, as no low rank serves them (rows that "
                 "are zero, beyond float32's range, or "
              << "of scores too large)\n";
  }
}

/// --generate: tokens, speed, and the bytes of the cache over all tensor-parallel ranks against
/// those of a cache of exact keys and values.
nlohmann::ordered_json generation(CausalLM& model, LowRankController& controller,
                                  const TokenFile& file, const Mesh& mesh) {
  const at::Tensor prompt = file.read(0, FLAGS_prompt_tokens).contiguous();
  controller.take_statistics();
  const Generation made = generate(model, prompt,
                                   {.tokens = FLAGS_generate,
                                    .temperature = FLAGS_temperature,
                                    .top_k = FLAGS_top_k,
                                    .seed = FLAGS_seed});
  const AttentionStatistics a = reduce({.attention = controller.take_statistics()}, mesh).attention;
  auto bytes = at::tensor({made.cache_bytes, made.peak_cache_bytes}, at::kLong);
  mesh.tp().all_reduce(bytes);
  auto seconds = at::tensor({made.prefill_seconds, made.decode_seconds}, at::kDouble);
  mesh.tp().all_reduce(seconds, ReduceOp::kMax);
  const ModelConfig& config = model.config();
  const auto element = static_cast<int64_t>(c10::elementSize(model.options().dtype));
  const double prefill_s = seconds[0].item<double>(), decode_s = seconds[1].item<double>();
  nlohmann::ordered_json json = {
      {"prompt", to_vector(prompt)},
      {"generated", to_vector(made.tokens)},
      {"prompt_tokens", FLAGS_prompt_tokens},
      {"generated_tokens", FLAGS_generate},
      {"prefill_tokens_per_second", static_cast<double>(FLAGS_prompt_tokens) / prefill_s},
      {"decode_tokens_per_second", nullptr},
      {"kv_cache_bytes", bytes[0].item<int64_t>()},
      {"kv_cache_bytes_peak", bytes[1].item<int64_t>()},
      {"full_kv_cache_bytes", 2 * config.num_hidden_layers * config.num_key_value_heads *
                                  config.head_dim * element * made.cached_tokens},
      {"refreshes", a.solves},
      {"solves_ms", a.solve_ms},
      {"attention_ms", a.attention_ms},
      {"far_pairs", a.decisions},
      {"exact_pairs", a.exact_pairs},
      {"mean_rank_qk", mean_rank(a.rank_qk, a, config.head_dim)},
      {"mean_rank_v", mean_rank(a.rank_v, a, config.head_dim)}};
  if (FLAGS_generate > 1) {
    json["decode_tokens_per_second"] = static_cast<double>(FLAGS_generate - 1) / decode_s;
  }
  return json;
}

void print_generation(const nlohmann::ordered_json& json) {
  std::cout << "tokens " << json["generated"].dump() << "\n"
            << "prefill " << json["prefill_tokens_per_second"].get<double>() << " tokens/s";
  if (!json["decode_tokens_per_second"].is_null()) {
    std::cout << ", decode " << json["decode_tokens_per_second"].get<double>() << " tokens/s";
  }
  const double full = json["full_kv_cache_bytes"].get<double>();
  std::cout << ", KV cache " << json["kv_cache_bytes"] << " bytes, "
            << json["kv_cache_bytes"].get<double>() / full << " of exact keys and values ("
            << json["kv_cache_bytes_peak"].get<double>() / full << " at most), mean ranks "
            << json["mean_rank_qk"].get<double>() << " / " << json["mean_rank_v"].get<double>()
            << "\n";
  print_exact_pairs(json);
}

/// --examples: the share of questions that is answered right, and what attention cost. `lines` <- a
/// JSON object for each question.
nlohmann::ordered_json answers(CausalLM& model, LowRankController& controller,
                               const std::vector<Example>& examples, const Mesh& mesh,
                               std::vector<nlohmann::ordered_json>& lines) {
  const size_t count = examples.size();
  std::vector<double> attention_ms(count), flops(count), right,
      logprobs;  // right: of all questions in turn; logprobs: of all of their targets
  Totals totals;
  const auto watched = watch(watchdog(), "answers");
  for (size_t i = 0; i < count; ++i) {
    sign_of_life();
    const Example& example = examples[i];
    const bool mine = static_cast<int64_t>(i) % mesh.dp().size() == mesh.dp().rank();
    std::vector<QuestionScore> scores;
    if (mine) {
      controller.take_statistics();
      scores = score(model, example);
      const AttentionStatistics spent = controller.take_statistics();
      totals.attention += spent;
      attention_ms[i] = spent.attention_ms;
      flops[i] = spent.flops / spent.exact_flops;
    }
    for (size_t q = 0; q < example.questions.size(); ++q) {
      const std::vector<double> none(example.questions[q].targets.size());
      const std::vector<double>& own = mine ? scores[q].logprobs : none;
      logprobs.insert(logprobs.end(), own.begin(), own.end());
      right.push_back(mine && scores[q].right ? 1 : 0);
    }
  }
  const AttentionStatistics all = reduce(totals, mesh).attention;
  right = merge(right, mesh);
  attention_ms = merge(attention_ms, mesh);
  flops = merge(flops, mesh);
  logprobs = merge(logprobs, mesh);

  double hits = 0, nll = 0;
  auto logprob = logprobs.begin();
  for (size_t i = 0; i < count; ++i) {
    const Example& example = examples[i];
    for (const Question& question : example.questions) {
      const std::vector<double> own(logprob,
                                    logprob + static_cast<std::ptrdiff_t>(question.targets.size()));
      logprob += static_cast<std::ptrdiff_t>(own.size());
      const double answer_nll = -own[static_cast<size_t>(question.answer)];
      const bool hit = right[lines.size()] > 0;
      hits += hit ? 1 : 0;
      nll += answer_nll;
      lines.push_back(
          {{"id", example.id},
           {"at", question.at},
           {"right", hit},
           {"nll", answer_nll},
           {"logprobs", own},
           {"context_tokens", example.context.numel()},
           {"attention_flops_fraction", flops[i]},
           {"attention_ms", attention_ms[i] / static_cast<double>(example.questions.size())}});
    }
  }
  const auto questions = static_cast<double>(lines.size());
  nlohmann::ordered_json json = {{"accuracy", hits / questions},
                                 {"examples", count},
                                 {"questions", lines.size()},
                                 {"right", std::llround(hits)},
                                 {"nll", nll / questions}};
  json.update(attention_json(all, model.config().head_dim));
  return json;
}

void print_answers(const nlohmann::ordered_json& json) {
  std::cout << "accuracy " << json["accuracy"].get<double>() << " (" << json["right"] << " of "
            << json["questions"] << " right), nll of the answer " << json["nll"].get<double>()
            << ", attention FLOPs " << json["attention_flops_fraction"].get<double>()
            << " of exact, mean ranks " << json["mean_rank_qk"].get<double>() << " / "
            << json["mean_rank_v"].get<double>() << ", attention "
            << json["attention_ms"].get<double>() << " ms\n";
  print_exact_pairs(json);
}

/// Mean loss over windows of the data under the chosen policy, and under exact attention as well if
/// asked for. `decisions`, if any, writes down those of the chosen policy.
nlohmann::ordered_json evaluation(CausalLM& model, LowRankController& controller,
                                  DecisionRecorder* decisions, const SequenceDataset& data,
                                  int64_t windows, const Mesh& mesh) {
  const std::shared_ptr<RankPolicy> chosen = controller.policy();
  const std::shared_ptr<RankPolicy> full = make_full_policy();
  Totals policy_totals, full_totals;
  policy_totals.sequence_nll.resize(static_cast<size_t>(windows));
  full_totals.sequence_nll.resize(static_cast<size_t>(windows));
  const auto run = [&](int64_t window, const Batch& batch,
                       const std::shared_ptr<RankPolicy>& policy, Totals& totals) {
    controller.set_policy(policy);
    controller.take_statistics();
    if (decisions != nullptr) {
      decisions->set_sequence(policy == chosen ? std::optional(window) : std::nullopt);
    }
    const at::Tensor nll = model.token_nll(batch.tokens, batch.labels);
    totals.attention += controller.take_statistics();
    const double sum = nll.sum(at::kDouble).item<double>();
    totals.nll += sum;
    totals.tokens += batch.labels.numel();
    sign_of_life();
    totals.sequence_nll[static_cast<size_t>(window)] = sum /
                                                       static_cast<double>(batch.labels.numel());
  };
  const auto watched = watch(watchdog(), "evaluation");
  for (int64_t window = mesh.dp().rank(); window < windows; window += mesh.dp().size()) {
    const Batch batch = data.ordered(window, 1);
    // Exact attention first in every other sequence, so that neither profits from a warm cache.
    if (FLAGS_compare_full && window % 2 == 1) {
      run(window, batch, full, full_totals);
    }
    run(window, batch, chosen, policy_totals);
    if (FLAGS_compare_full && window % 2 == 0) {
      run(window, batch, full, full_totals);
    }
  }
  nlohmann::ordered_json json = result_json(reduce(policy_totals, mesh), model.config().head_dim);
  const std::optional<double> latency = chosen->latency_fraction();
  json["latency_fraction"] = latency ? nlohmann::ordered_json(*latency) : nlohmann::ordered_json();
  if (FLAGS_compare_full) {
    const nlohmann::ordered_json exact = result_json(reduce(full_totals, mesh),
                                                     model.config().head_dim);
    json["full_perplexity"] = exact["perplexity"];
    json["full_nll"] = exact["nll"];
    json["full_sequence_nll"] = exact["sequence_nll"];
    json["full_attention_ms"] = exact["attention_ms"];
  }
  return json;
}

void print_evaluation(const nlohmann::ordered_json& json) {
  std::cout << "perplexity " << json["perplexity"].get<double>() << " (" << json["tokens"]
            << " tokens), attention FLOPs " << json["attention_flops_fraction"].get<double>()
            << " of exact, mean ranks " << json["mean_rank_qk"].get<double>() << " / "
            << json["mean_rank_v"].get<double>() << ", attention "
            << json["attention_ms"].get<double>() << " ms of which solves "
            << json["solves_ms"].get<double>() << " ms\n";
  print_exact_pairs(json);
  if (!json["latency_fraction"].is_null()) {
    std::cout << "by the latency table these ranks take " << json["latency_fraction"].get<double>()
              << " of exact attention's time\n";
  }
  if (FLAGS_compare_full) {
    const double full_ppl = json["full_perplexity"].get<double>();
    std::cout << "exact attention: perplexity " << full_ppl << ", "
              << json["full_attention_ms"].get<double>() << " ms; this policy: perplexity "
              << std::showpos << 100 * (json["perplexity"].get<double>() / full_ppl - 1)
              << std::noshowpos << " %, "
              << json["full_attention_ms"].get<double>() / json["attention_ms"].get<double>()
              << " times as fast\n";
  }
}

nlohmann::ordered_json quantiles(const Sample& sample) {
  return {{"median", sample.quantile(0.5)},
          {"p10", sample.quantile(0.1)},
          {"p90", sample.quantile(0.9)},
          {"least", sample.quantile(0)},
          {"most", sample.quantile(1)}};
}

/// --audit_rows: counts over all levels, and quantiles over units of the audit.
void add_audit(const AuditReport& report, nlohmann::ordered_json& json) {
  int64_t pairs = 0, violations = report.block_violations;
  auto levels = nlohmann::ordered_json::array();
  Sample tightness, lagged;
  for (const AuditReport::Level& level : report.levels) {
    pairs += level.pairs;
    violations += level.violations;
    tightness.add(level.tightness);
    lagged.add(level.lagged_prediction);
    levels.push_back({{"audited_pairs", level.pairs},
                      {"certificate_violations", level.violations},
                      {"score_bound_tightness", quantiles(level.tightness)},
                      {"lagged_prediction_ratio", quantiles(level.lagged_prediction)}});
  }
  json["audited_pairs"] = pairs;
  json["audited_blocks"] = report.blocks;
  json["certificate_violations"] = violations;
  json["score_bound_tightness"] = quantiles(tightness);
  json["output_bound_tightness"] = quantiles(report.output_tightness);
  json["eq9_bound_tightness"] = quantiles(report.eq9_tightness);
  json["output_error"] = quantiles(report.output_error);
  json["score_loss_share"] = quantiles(report.score_loss);
  json["value_loss_share"] = quantiles(report.value_loss);
  json["lagged_prediction_ratio"] = quantiles(lagged);
  json["weyl_bound"] = quantiles(report.weyl);
  json["weyl_true"] = quantiles(report.shift);
  json["davis_kahan_bound"] = quantiles(report.davis_kahan);
  json["davis_kahan_true"] = quantiles(report.sine);
  json["audit_levels"] = std::move(levels);
}

void print_audit(const nlohmann::ordered_json& json) {
  const auto of = [](const nlohmann::ordered_json& from, const char* name, const char* quantile) {
    return from[name][quantile].is_null() ? std::nan("") : from[name][quantile].get<double>();
  };
  const auto line = [&](const nlohmann::ordered_json& from) {
    return c10::str(from["audited_pairs"].get<int64_t>(), " pairs, ",
                    from["certificate_violations"].get<int64_t>(),
                    " violations, score bound / error ",
                    of(from, "score_bound_tightness", "median"),
                    " (90 %: ", of(from, "score_bound_tightness", "p90"),
                    "), lagged prediction / loss ", of(from, "lagged_prediction_ratio", "median"));
  };
  std::cout << "audit: " << line(json) << "; " << json["audited_blocks"]
            << " blocks, output bound / error " << of(json, "output_bound_tightness", "median")
            << " (90 %: " << of(json, "output_bound_tightness", "p90") << "), Eq. 9 alone "
            << of(json, "eq9_bound_tightness", "median") << "\n";
  for (size_t i = 0; i < json["audit_levels"].size(); ++i) {
    std::cout << "  level " << i << ": " << line(json["audit_levels"][i]) << "\n";
  }
  std::cout << "  start to own subspace: Weyl " << of(json, "weyl_bound", "median") << " (true "
            << of(json, "weyl_true", "median") << "), Davis-Kahan "
            << of(json, "davis_kahan_bound", "median") << " (true "
            << of(json, "davis_kahan_true", "median") << ")\n";
}

/// --ablate. Errors: Error(kUsage).
Ablation ablation_flag() {
  Ablation ablation;
  for (const std::string& part : split(FLAGS_ablate, ',')) {
    check(ErrorKind::kUsage, part == "residual" || part == "mass", "--ablate=", FLAGS_ablate,
          ": expected residual, mass or both, got '", part, "'");
    (part == "residual" ? ablation.residual : ablation.mass) = true;
  }
  check(ErrorKind::kUsage, FLAGS_ablate.empty() || FLAGS_attention == "lowrank",
        "--ablate=", FLAGS_ablate, " needs --attention=lowrank, got ", FLAGS_attention);
  return ablation;
}

ExitCode evaluate(const Environment& environment) {
  require("model", FLAGS_model);
  const bool answering = !FLAGS_examples.empty();
  if (!answering) {
    require("data", FLAGS_data);
  }
  check(ErrorKind::kUsage, answering || FLAGS_examples_out.empty(),
        "--examples_out=", FLAGS_examples_out, " needs --examples");
  check(ErrorKind::kUsage,
        !answering || (FLAGS_data.empty() && FLAGS_generate == 0 && FLAGS_audit_rows == 0 &&
                       !FLAGS_compare_full),
        "--examples=", FLAGS_examples,
        " goes neither with --data, in whose place it stands, nor with --generate, --audit_rows or "
        "--compare_full");
  check(ErrorKind::kUsage, FLAGS_max_tokens >= 0, "--max_tokens must not be negative, got ",
        FLAGS_max_tokens);
  check(ErrorKind::kUsage, FLAGS_generate >= 0, "--generate must not be negative, got ",
        FLAGS_generate);
  check(ErrorKind::kUsage, FLAGS_audit_rows >= 0, "--audit_rows must not be negative, got ",
        FLAGS_audit_rows);
  check(ErrorKind::kUsage,
        FLAGS_audit_rows == 0 ||
            (FLAGS_attention == "lowrank" && FLAGS_dtype == "fp32" && FLAGS_generate == 0),
        "--audit_rows needs --attention=lowrank and --dtype=fp32, and does not go with --generate");
  check(ErrorKind::kUsage, !FLAGS_gates || FLAGS_generate == 0,
        "--gates does not go with --generate, whose cache holds no exact far keys");
  check(ErrorKind::kUsage, FLAGS_audit_rows == 0 || !FLAGS_compare_full,
        "--audit_rows does not go with --compare_full, whose times it would disturb");
  check(ErrorKind::kUsage, FLAGS_audit_rows == 0 || environment.world_size == 1,
        "--audit_rows runs in one process, this job has ", environment.world_size);
  check(
      ErrorKind::kUsage,
      FLAGS_decisions.empty() || (environment.world_size == 1 && !answering && FLAGS_generate == 0),
      "--decisions=", FLAGS_decisions,
      " goes with an evaluation of --data in one process, this job has ", environment.world_size);
  const Ablation ablation = ablation_flag();
  check(ErrorKind::kUsage, FLAGS_balance_speeds.empty() || (!answering && FLAGS_generate == 0),
        "--balance_speeds chooses ranks for sequences of --seq_len, it goes "
        "neither with --examples nor with --generate");
  MeshShape shape = mesh_flags(environment);
  const at::Device device = device_flag(environment);
  const ModelConfig config = read_model_config();
  shape.kv_heads = config.num_key_value_heads;
  const auto file = answering ? nullptr : open_token_file(FLAGS_data, config, environment);
  std::vector<Example> examples;
  std::optional<SequenceDataset> data;
  int64_t windows = 0;
  if (answering) {
    check(ErrorKind::kUsage, shape.cp == 1, "--examples does not go with --cp=", shape.cp,
          ", expected 1");
    const auto watched = watch(watchdog(), "reading examples");
    examples = read_examples(FLAGS_examples, config);
    if (environment.world_rank == 0) {
      check_tokenizer(FLAGS_examples, FLAGS_model);
    }
  } else if (FLAGS_generate > 0) {
    check(ErrorKind::kUsage, shape.dp == 1 && shape.cp == 1,
          "--generate continues one sequence, --dp=", shape.dp, " times --cp=", shape.cp,
          " processes cannot share it");
    check(ErrorKind::kUsage, FLAGS_prompt_tokens >= 1 && FLAGS_prompt_tokens <= file->tokens(),
          "--prompt_tokens=", FLAGS_prompt_tokens, " must lie in [1, ", file->tokens(),
          "], the tokens of ", FLAGS_data);
    check(ErrorKind::kUsage, FLAGS_prompt_tokens + FLAGS_generate <= config.max_position_embeddings,
          "--prompt_tokens=", FLAGS_prompt_tokens, " and --generate=", FLAGS_generate,
          " are more than ", config.max_position_embeddings, ", the positions of ", FLAGS_model);
    check(ErrorKind::kUsage, FLAGS_temperature >= 0 && FLAGS_top_k >= 0,
          "--temperature and --top_k must not be negative, got ", FLAGS_temperature, " and ",
          FLAGS_top_k);
  } else {
    check_seq_len(config);
    data.emplace(file, 0, file->tokens(), FLAGS_seq_len, FLAGS_seed);
    windows = data->windows();
    if (FLAGS_max_tokens > 0) {
      windows = std::min(windows, (FLAGS_max_tokens - 1) / FLAGS_seq_len + 1);
    }
  }

  agree_on_inputs(environment, attention_inputs({"model", "data", "examples"}));
  check_outputs(environment, {"json", "decisions", "examples_out"});
  const Mesh mesh = create_mesh(environment, shape, device);
  guarded(environment, [&] {
    const bool leader = environment.world_rank == 0;
    const AttentionSetup attention = attention_flags(config, mesh, device);
    if (!FLAGS_ablate.empty()) {
      attention.controller->leave_out(ablation);
    }
    if (!FLAGS_balance_speeds.empty()) {
      balance_for_speeds(FLAGS_balance_speeds, config, device, *attention.controller);
    }
    const std::string description = attention.controller->describe();  // of the chosen policy,
                                                                       // whatever is set later
    attention.controller->set_timing(true);
    std::shared_ptr<AuditController> audit;
    if (FLAGS_audit_rows > 0) {
      audit = std::make_shared<AuditController>(attention.controller, FLAGS_audit_rows,
                                                attention.controller->bases().start);
    }
    std::shared_ptr<AttentionController> used = audit
                                                    ? std::static_pointer_cast<AttentionController>(
                                                          audit)
                                                    : attention.controller;
    std::shared_ptr<DecisionRecorder> decisions;
    if (!FLAGS_decisions.empty()) {
      used = decisions = std::make_shared<DecisionRecorder>(used, geometry_flags());
    }
    CausalLM model(config, mesh.tp(), used,
                   {.dtype = dtype_flag("dtype", FLAGS_dtype), .device = device});
    load_weights(model, mesh.world());
    check_replicas(model, mesh);
    if (leader) {
      print_banner(
          std::cout, "drrl-eval",
          {{"model", FLAGS_model},
           {"data", answering ? c10::str(FLAGS_examples, ": ", examples.size(), " examples")
                    : FLAGS_generate > 0
                        ? c10::str(FLAGS_data, ": the first ", FLAGS_prompt_tokens, " tokens")
                        : c10::str(FLAGS_data, ": ", windows, " sequences of ", FLAGS_seq_len)},
           {"parallel",
            c10::str("tensor ", shape.tp, " x data ", shape.dp, " x context ", shape.cp)},
           {"attention", description},
           {"versions", version_line()}});
      for (const std::string& warning : config.warnings) {
        log_warning(warning);
      }
    }

    std::vector<nlohmann::ordered_json> lines;
    nlohmann::ordered_json json = answering
                                      ? answers(model, *attention.controller, examples, mesh, lines)
                                  : data ? evaluation(model, *attention.controller, decisions.get(),
                                                      *data, windows, mesh)
                                         : generation(model, *attention.controller, *file, mesh);
    if (audit) {
      add_audit(audit->report(), json);
    }
    json["attention"] = description;
    json["dtype"] = FLAGS_dtype;
    json["device"] = FLAGS_device;
    json["threads"] = at::get_num_threads();
    json["world_size"] = environment.world_size;
    json["tp"] = shape.tp;
    json["dp"] = shape.dp;
    json["cp"] = shape.cp;
    json["versions"] = version_line();
    for (const Option& option : options()) {
      json["options"][option.name] = option.value;
    }
    if (leader) {
      (answering ? print_answers : data ? print_evaluation : print_generation)(json);
      if (audit) {
        print_audit(json);
      }
      std::cout << std::flush;
      const auto write_lines = [](const std::string& path,
                                  const std::vector<nlohmann::ordered_json>& of) {
        std::string text;
        for (const nlohmann::ordered_json& line : of) {
          text += line.dump() + "\n";
        }
        write_text(path, text);
      };
      if (!FLAGS_examples_out.empty()) {
        write_lines(FLAGS_examples_out, lines);
      }
      if (decisions) {
        write_lines(FLAGS_decisions, decisions->lines());
      }
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
  return drrl::run_program(argc, argv, "drrl-eval",
                           "drrl-eval: perplexity under a rank policy, or with --examples "
                           "accuracy, and what attention cost; with --generate, text.",
                           &drrl::evaluate);
}
