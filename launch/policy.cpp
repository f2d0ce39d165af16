// drrl-policy: what ranks cost a model, measured on real text (calibrate, record), and the policy
// that learns from it (train). Options: drrl-policy --help.

#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <optional>

#include <ATen/CPUGeneratorImpl.h>
#include <gflags/gflags.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/io/file_io.h"
#include "distributed/topology/mesh.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/options/policy_flags.h"
#include "launch/runtime/agreement.h"
#include "launch/runtime/console.h"
#include "launch/runtime/log.h"
#include "launch/runtime/program.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/config.h"
#include "models/causal_lm/replicas.h"
#include "models/causal_lm/tensor_parallel.h"
#include "models/data/sequence_dataset.h"
#include "models/data/token_file.h"
#include "policy/agent/agent_training.h"
#include "policy/agent/traces.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/calibration/calibration.h"
#include "policy/calibration/calibration_controller.h"

DEFINE_string(traces, "",
              "file that drrl-policy record writes, or goes on with, and train reads, which takes "
              "several, with commas between");
DEFINE_int64(
    held_out, 1,
    "sequences of each trace file that drrl-policy train does not learn from but judges by");
DEFINE_int64(validation, 2,
             "sequences of each trace file, at least 2, by which drrl-policy train decides how far "
             "the agent is trusted");
DEFINE_int64(fit_steps, 300, "of drrl-policy train, value fit");
DEFINE_int64(reward_steps, 300, "of drrl-policy train, policy gradient");
DEFINE_int64(calibration_tokens, 8192,
             "text to calibrate on, from evenly spread sequences of --data, rounded up to whole "
             "ones [tokens]");

namespace drrl {
namespace {

/// Labels drawn from the model's own next-token distribution: with them a gradient is a Fisher
/// score vector.
at::Tensor sampled_labels(CausalLM& model, const at::Tensor& tokens) {
  at::NoGradGuard no_grad;
  const at::Tensor logits = model.logits(tokens);  // [1, L, vocabulary]
  std::vector<at::Tensor> drawn;
  for (const at::Tensor& rows : logits.squeeze(0).split(256)) {
    // The inverse of the distribution function at one uniform number a row; at::multinomial draws
    // one for each word of the vocabulary.
    const at::Tensor cumulative = at::softmax(rows, 1).to(at::kCPU).cumsum(1, at::kDouble);
    const at::Tensor uniform = at::rand({rows.size(0), 1}, at::kDouble) * cumulative.slice(1, -1);
    drawn.push_back(
        at::searchsorted(cumulative, uniform).clamp_max(cumulative.size(1) - 1).squeeze(1));
  }
  return at::cat(drawn).unsqueeze(0).to(at::kCPU);
}

/// All processes' measurements together: each has its own KV groups (tensor parallel) and its own
/// text (data parallel). Collective.
Calibration gathered(const CalibrationController& mine, const ModelConfig& config, const Mesh& mesh,
                     double tokens) {
  const IndexRange groups = partition(config.num_key_value_heads, mesh.tp().size(),
                                      mesh.tp().rank());
  const auto whole = [&](const at::Tensor& part) {
    auto sizes = part.sizes().vec();
    sizes[1] = config.num_key_value_heads;
    auto all = at::zeros(sizes, part.options());
    all.narrow(1, groups.begin, groups.count).copy_(part);
    mesh.world().all_reduce(all);
    return all;
  };
  auto counted = at::tensor({tokens}, at::kDouble);
  mesh.dp().all_reduce(counted);
  Calibration result;
  result.tokens = counted[0].item<int64_t>();
  result.damage = whole(mine.damage()) / counted;
  result.gates = CalibrationController::default_gates();
  result.gated_damage = whole(mine.gated_damage()) / counted;
  auto entries = mine.entries().clone();  // [layers, levels], the same for every group
  mesh.dp().all_reduce(entries);
  result.exact_entries = whole(mine.exact_entries()) /
                         entries.view({entries.size(0), 1, entries.size(1), 1, 1});
  result.bases = starting_bases(whole(mine.grams()));
  return result;
}

/// KL(exact || low rank) of the next-token distributions of some sequences, summed over their
/// positions [nats].
double divergence(CausalLM& exact, CausalLM& low, const at::Tensor& tokens) {
  at::NoGradGuard no_grad;
  const at::Tensor p = exact.logits(tokens).flatten(0, 1), q = low.logits(tokens).flatten(0, 1);
  double sum = 0;
  for (int64_t row = 0; row < p.size(0); row += 256) {
    const auto log_p = at::log_softmax(p.slice(0, row, row + 256), 1),
               log_q = at::log_softmax(q.slice(0, row, row + 256), 1);
    sum += (log_p.exp() * (log_p - log_q)).sum(at::kDouble).item<double>();
  }
  return sum;
}

/// Each layer's damage at each rank, over its KV groups and levels.
void print_damage(const Calibration& c) {
  std::cout << "layer";
  for (const char* kind : {"scores", "values"}) {
    for (const int64_t rank : c.ranks) {
      std::printf("%*s%lld", 7, kind, static_cast<long long>(rank));
    }
  }
  std::printf("   (KL in 1e-3 nats per token)\n");
  const at::Tensor sums = c.damage.sum(at::IntArrayRef{1, 3}).contiguous();  // [layers, 2, ranks]
  for (int64_t layer = 0; layer < c.layers(); ++layer) {
    std::printf("%5lld", static_cast<long long>(layer));
    for (int64_t i = 0; i < sums[layer].numel(); ++i) {
      std::printf("%9.4f", 1e3 * sums[layer].const_data_ptr<double>()[i]);
    }
    std::printf("\n");
  }
  std::fflush(stdout);
}

/// What both commands need: the model with exact attention that measures, and sequences of text
/// evenly spread over --data.
class Measurement {
 public:
  explicit Measurement(const Environment& environment)
      : environment_(environment),
        shape_(mesh_flags(environment)),
        device(device_flag(environment)),
        config(read_model_config()),
        geometry(geometry_flags()),
        ranks(bucket_flags(device, config.head_dim)) {
    check(ErrorKind::kUsage, shape_.cp == 1,
          "drrl-policy does not split sequences, --cp=", shape_.cp);
    check_whole_groups("drrl-policy", shape_.tp, config);
    check(ErrorKind::kUsage, FLAGS_calibration_tokens >= 1,
          "--calibration_tokens must be at least 1, got ", FLAGS_calibration_tokens);
    check(ErrorKind::kUsage,
          FLAGS_seq_len > geometry.near_block + geometry.sink_tokens &&
              FLAGS_seq_len <= config.max_position_embeddings,
          "--seq_len=", FLAGS_seq_len, " must be more than --near_block + --sink_tokens = ",
          geometry.near_block + geometry.sink_tokens, " and at most ",
          config.max_position_embeddings, ", the positions of ", FLAGS_model);
    ranks.pop_back();  // exact does no damage
    check(ErrorKind::kUsage, !ranks.empty(), "a head_dim of ", config.head_dim,
          " has no smaller ranks to calibrate");
    const auto file = open_token_file(FLAGS_data, config, environment);
    data_.emplace(file, 0, file->tokens(), FLAGS_seq_len, FLAGS_seed);
    windows = std::min(data_->windows(), (FLAGS_calibration_tokens - 1) / FLAGS_seq_len + 1);
    agree_on_inputs(environment, {"model", "data"});
    mesh_.emplace(create_mesh(environment, shape_, device));
  }

  /// Collective over the world.
  void load(const char* program) {
    controller = std::make_shared<CalibrationController>(config.num_hidden_layers, geometry, ranks);
    model = new_model(controller);
    check_replicas(*model, mesh());
    for (Parameter& parameter : model->parameters()) {  // only activations' gradients are wanted;
                                                        // the embedding starts the graph
      parameter.value.requires_grad_(&parameter == &model->parameters().front());
    }
    if (leader()) {
      print_banner(std::cout, program,
                   {{"model", FLAGS_model},
                    {"data", c10::str(FLAGS_data, ": ", windows, " sequences of ", FLAGS_seq_len)},
                    {"ranks", c10::str(c10::IntArrayRef(ranks))},
                    {"versions", version_line()}});
      for (const std::string& warning : config.warnings) {
        log_warning(warning);
      }
    }
    set_labels(mesh().dp().rank());
  }

  /// From now on labels are those of this stream: all ranks of a tensor-parallel group must draw
  /// the same.
  void set_labels(int64_t stream) {
    generator_.set_current_seed(FLAGS_seed * 1000003 + static_cast<uint64_t>(stream));
  }

  std::unique_ptr<CausalLM> new_model(const std::shared_ptr<AttentionController>& attention) const {
    auto result = std::make_unique<CausalLM>(config, mesh().tp(), attention,
                                             ModelOptions{.dtype = dtype_flag("dtype", FLAGS_dtype),
                                                          .device = device,
                                                          .activation_checkpoint = false});
    load_weights(*result, mesh().world());
    return result;
  }

  bool leader() const { return environment_.world_rank == 0; }
  const Mesh& mesh() const { return *mesh_; }
  /// This process's KV groups of the model's.
  IndexRange groups() const {
    return partition(config.num_key_value_heads, mesh().tp().size(), mesh().tp().rank());
  }
  at::Tensor tokens(int64_t sequence) const {
    const auto watched = watch(watchdog(), "reading a sequence");
    return data_->ordered(sequence * data_->windows() / windows, 1).tokens;
  }

  /// Calls visit(sequence) for each of this data-parallel rank's sequences.
  template <typename Visit>
  void for_each_sequence(const Visit& visit) const {
    for (int64_t i = mesh().dp().rank(); i < windows; i += mesh().dp().size()) {
      visit(i);
    }
  }

  /// One backward pass over a sequence with labels of the model's own: adds to what the controller
  /// has measured.
  void measure(int64_t sequence) {
    const at::Tensor x = tokens(sequence);
    const at::Tensor loss = model->loss(x, sampled_labels(*model, x)).loss_sum;
    check_loss(sequence, loss.item<double>());
    loss.backward();
    model->parameters().front().value.mutable_grad().reset();
  }

 private:
  const Environment& environment_;
  MeshShape shape_;

 public:
  at::Device device;
  ModelConfig config;
  Geometry geometry;
  std::vector<int64_t> ranks;
  int64_t windows = 0;
  std::shared_ptr<CalibrationController> controller;
  std::unique_ptr<CausalLM> model;

 private:
  std::optional<SequenceDataset> data_;
  std::optional<Mesh> mesh_;
  at::Generator generator_ = at::detail::getDefaultCPUGenerator();
};

ExitCode calibrate(const Environment& environment) {
  require("model", FLAGS_model);
  require("data", FLAGS_data);
  require("policy", FLAGS_policy);
  check_outputs(environment, {"policy"});
  Measurement m(environment);
  const Mesh& mesh = m.mesh();
  guarded(environment, [&] {
    m.load("drrl-policy calibrate");
    double tokens = 0;
    m.for_each_sequence([&](int64_t sequence) {
      m.measure(sequence);
      tokens += static_cast<double>(FLAGS_seq_len);
      if (m.leader()) {
        std::cout << "sequence " << sequence + 1 << " of " << m.windows << std::endl;
      }
    });
    const std::vector<int64_t>& ranks = m.ranks;
    Calibration result = gathered(*m.controller, m.config, mesh, tokens);
    result.geometry = m.geometry;
    result.seq_len = FLAGS_seq_len;
    result.model = FLAGS_model;
    result.data = FLAGS_data;
    result.ranks = ranks;

    // The damages are those of one item at a time. Errors of many layers do not add up
    // independently, those of values less so than those of scores, so each kind is scaled to what
    // is measured when all its items have the middle rank at once.
    const size_t middle = (ranks.size() - 1) / 2;
    const IndexRange groups = m.groups();
    const BasisOptions bases{
        .update_steps = FLAGS_basis_updates,
        .start = result.bases.narrow(1, groups.begin, groups.count).to(m.device)};
    const auto low_controller = std::make_shared<LowRankController>(make_exact_policy(), m.geometry,
                                                                    bases, groups.begin);
    const auto low = m.new_model(low_controller);
    const int64_t d = m.config.head_dim;
    for (int64_t kind = 0; kind < 2; ++kind) {
      low_controller->set_policy(make_table_policy(
          RankTable(result.layers(), result.groups(), result.levels(),
                    kind == 0 ? Ranks{ranks[middle], d} : Ranks{d, ranks[middle]}),
          "middle rank"));
      double nats = 0;
      m.for_each_sequence(
          [&](int64_t sequence) { nats += divergence(*m.model, *low, m.tokens(sequence)); });
      auto together = at::tensor({nats}, at::kDouble);
      mesh.dp().all_reduce(together);
      const double measured = together[0].item<double>() / static_cast<double>(result.tokens);
      const double summed = result.damage.select(2, kind)
                                .select(3, static_cast<int64_t>(middle))
                                .sum()
                                .item<double>();
      if (m.leader()) {
        std::cout << (kind == 0 ? "scores" : "values") << " of all layers at rank " << ranks[middle]
                  << ": " << measured << " nats per token, " << summed << " summed over layers"
                  << std::endl;
      }
      constexpr double kRounding = 1e-7;  // nats: less is no divergence, and may be negative
      if (summed > 0 && measured > kRounding) {
        result.damage.select(2, kind) *= measured / summed;
        result.gated_damage.select(2, kind) *= measured / summed;
      }
    }
    if (m.leader()) {
      result.save(FLAGS_policy);
      print_damage(result);
      std::cout << "wrote " << FLAGS_policy << std::endl;
    }
    mesh.world().barrier();
  });
  return ExitCode::kSuccess;
}

/// Traces for the learned policy: of every sequence what each pair looked like and, for two
/// independent draws of labels, what each rank would have cost it. Written after every sequence, or
/// as many as there are data-parallel processes; a file with some of them is gone on with.
ExitCode record(const Environment& environment) {
  require("model", FLAGS_model);
  require("data", FLAGS_data);
  require("policy", FLAGS_policy);
  require("traces", FLAGS_traces);
  check_outputs(environment, {"traces"});
  Measurement m(environment);
  guarded(environment, [&] {
    agree_on_inputs(environment, {"policy", "traces"});
    const Calibration calibration = read_calibration();
    check_calibration(calibration, m.config);
    check_geometry(calibration);
    check(ErrorKind::kUsage, calibration.ranks == m.ranks, "--policy=", FLAGS_policy,
          " is of ranks ", c10::IntArrayRef(calibration.ranks), ", the options say ",
          c10::IntArrayRef(m.ranks));
    Traces traces(m.windows, m.config.num_hidden_layers, m.config.num_key_value_heads,
                  FLAGS_seq_len, m.geometry, m.ranks, CalibrationController::default_gates());
    traces.heads_per_group = m.config.num_attention_heads / m.config.num_key_value_heads;
    traces.calibration = calibration.digest();
    traces.source = c10::str(FLAGS_model, ", ", m.windows, " sequences of ", FLAGS_seq_len,
                             " tokens of ", FLAGS_data, ", seed ", FLAGS_seed);
    for (int64_t sequence = 0; sequence < m.windows; ++sequence) {
      traces.tokens[sequence].copy_(m.tokens(sequence).squeeze(0));
    }
    int64_t done = 0;
    if (std::filesystem::exists(FLAGS_traces)) {
      const auto watched = watch(watchdog(), "reading traces");
      const Traces before = Traces::load(FLAGS_traces);
      check(ErrorKind::kUsage,
            !m.leader() ||
                (before.source == traces.source && before.calibration == traces.calibration),
            "--traces=", FLAGS_traces, " is of ", before.source, ", calibration ",
            before.calibration, ", and would be of ", traces.source, ", calibration ",
            traces.calibration, ": name another file or remove it");
      done = before.sequences();
      for (const auto part : Traces::kMeasured) {
        (traces.*part).narrow(0, 0, done).copy_(before.*part);
      }
    }
    m.load("drrl-policy record");
    if (m.leader() && done > 0) {
      std::cout << FLAGS_traces << " has " << done << " of " << m.windows << " sequences"
                << std::endl;
    }
    const IndexRange groups = m.groups();
    m.controller->record(calibration.bases.narrow(1, groups.begin, groups.count).to(m.device));
    for (const int64_t members = m.mesh().dp().size(); done < m.windows;) {
      if (const int64_t sequence = done + m.mesh().dp().rank(); sequence < m.windows) {
        m.set_labels(sequence);
        for (int64_t draw = 0; draw < Traces::kDraws; ++draw) {
          m.measure(sequence);
          traces.put(sequence, draw, groups.begin, m.controller->pairs());
        }
      }
      const int64_t count = std::min(members, m.windows - done);
      for (const auto part : Traces::kMeasured) {
        at::Tensor rows = (traces.*part).narrow(0, done, count);
        m.mesh().world().all_reduce(rows);
      }
      done += count;
      if (m.leader()) {
        traces.first(done).save(FLAGS_traces);
        std::cout << "sequence " << done << " of " << m.windows << std::endl;
      }
    }
    if (m.leader()) {
      std::cout << "wrote " << FLAGS_traces << std::endl;
    }
    m.mesh().world().barrier();
  });
  return ExitCode::kSuccess;
}

/// The agent of --policy, from traces; written into the same file. One process: a few seconds to
/// minutes of small matrices.
ExitCode train(const Environment& environment) {
  require("policy", FLAGS_policy);
  require("traces", FLAGS_traces);
  check(ErrorKind::kUsage, environment.world_size == 1,
        "drrl-policy train runs in one process, not in ", environment.world_size);
  check(ErrorKind::kUsage, FLAGS_fit_steps >= 0 && FLAGS_reward_steps >= 0,
        "--fit_steps and --reward_steps must not be negative, got ", FLAGS_fit_steps, " and ",
        FLAGS_reward_steps);
  check_outputs(environment, {"policy", "json"});
  const Calibration calibration = read_calibration();
  std::vector<Traces> traces;
  for (const std::string& file : split(FLAGS_traces, ',')) {
    const auto watched = watch(watchdog(), "reading traces");
    traces.push_back(Traces::load(file));
  }
  AgentTrainingOptions options;
  options.fit_steps = FLAGS_fit_steps;
  options.reward_steps = FLAGS_reward_steps;
  options.held_out = FLAGS_held_out;
  options.validation = FLAGS_validation;
  options.buckets = bucket_flags(device_flag(environment), calibration.head_dim());
  options.update_steps = FLAGS_basis_updates;
  options.with_gates = FLAGS_gates;
  options.latency = latency_flag(device_flag(environment), calibration.head_dim(),
                                 traces.front().heads_per_group);
  options.seed = FLAGS_seed;
  RankAgent agent(calibration.layers(), calibration.groups(), calibration.ranks,
                  calibration.gate_count(), FLAGS_seed);
  const auto reports = train_agent(agent, calibration, traces, options,
                                   [](const std::string& line) { std::cout << line << std::endl; });
  std::printf(
      "held-out damage in 1e-3 nats per token at equal %s:\n%6s %7s %9s %9s %9s %9s %9s   %s\n",
      options.latency ? "time" : "operations", "L", "budget", "dp", "refitted", "agent", "oracle",
      "bound", "what the agent takes at its own prices");
  nlohmann::ordered_json json = {
      {"agent_strength", agent.strength()}, {"gates", options.with_gates}, {"seed", FLAGS_seed}};
  for (const BudgetReport& r : reports) {
    json["held_out"].push_back({{"seq_len", r.seq_len},
                                {"budget", r.budget},
                                {"dp", r.dp},
                                {"refitted", r.refitted},
                                {"agent", r.agent},
                                {"oracle", r.oracle},
                                {"bound", r.bound},
                                {"agent_cost", r.agent_cost}});
    std::printf("%6lld %7.3f %9.4f %9.4f %9.4f %9.4f %9.4f   %.4f\n",
                static_cast<long long>(r.seq_len), r.budget, 1e3 * mean_damage(r.dp),
                1e3 * r.refitted, 1e3 * mean_damage(r.agent), 1e3 * r.oracle, 1e3 * r.bound,
                r.agent_cost);
  }
  if (!FLAGS_json.empty()) {
    write_text(FLAGS_json, json.dump(1) + "\n");
  }
  agent.save(FLAGS_policy, calibration);
  std::cout << "wrote " << FLAGS_policy << std::endl;
  return ExitCode::kSuccess;
}

}  // namespace
}  // namespace drrl

int main(int argc, char** argv) {
  using Command = drrl::ExitCode (*)(const drrl::Environment&);
  const std::map<std::string, Command> commands = {
      {"calibrate", &drrl::calibrate}, {"record", &drrl::record}, {"train", &drrl::train}};
  const char* summary =
      "drrl-policy calibrate: measures how much each layer suffers at each rank; record: traces "
      "for a policy that learns; train: learns from them.";
  const std::string word = argc > 1 ? argv[1] : "";
  if (const auto command = commands.find(word); command != commands.end()) {
    argv[1] = argv[0];
    return drrl::run_program(argc - 1, argv + 1, "drrl-policy " + word, summary, command->second);
  }
  const auto usage = [](const drrl::Environment&) {
    std::fprintf(
        stderr,
        "usage: drrl-policy calibrate|record|train --policy FILE [options] (--help lists them)\n");
    return drrl::ExitCode::kUsage;
  };
  return word.starts_with("-")
             ? drrl::run_program(argc, argv, "", summary, usage)  // --help, --version
             : static_cast<int>(usage({}));
}
