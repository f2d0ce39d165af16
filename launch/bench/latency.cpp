// drrl-bench latency: what each rank costs on this device, for policies that spend ms instead of
// operations.

#include <algorithm>
#include <cmath>
#include <iostream>
#include <random>

#include <gflags/gflags.h>

#include "core/attention/exact_attention.h"
#include "core/error.h"
#include "launch/bench/bench.h"
#include "launch/bench/flags.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/options/policy_flags.h"
#include "launch/runtime/console.h"
#include "launch/runtime/program.h"
#include "models/causal_lm/config.h"
#include "policy/allocation/allocation.h"
#include "policy/attention/layer_plan.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/calibration/calibration.h"
#include "policy/rank_policy.h"

DECLARE_string(head_dims);
DECLARE_string(heads);
DECLARE_string(kv_groups);
DEFINE_bool(with_backward, false,
            "latency: times of forward and backward passes together, for training, instead of the "
            "forward alone");

namespace drrl::bench {
namespace {

constexpr double kExactShare = 0.02;  // of the entries, when gates are measured

struct Shape {
  int64_t head_dim, heads, groups;
};

Shape shape_flags() {
  if (!FLAGS_model.empty()) {
    const ModelConfig config = read_config();
    return {config.head_dim, config.num_attention_heads, config.num_key_value_heads};
  }
  const auto one = [](const char* flag, const std::string& text) {
    const auto list = parse_list(flag, text, 1);
    check(ErrorKind::kUsage, list.size() == 1, "--", flag, "=", text,
          ": drrl-bench latency measures one shape");
    return list.front();
  };
  const Shape s{one("head_dims", FLAGS_head_dims), one("heads", FLAGS_heads),
                one("kv_groups", FLAGS_kv_groups)};
  check(ErrorKind::kUsage, s.heads % s.groups == 0, s.heads, " heads cannot be dealt out to ",
        s.groups, " KV groups evenly");
  return s;
}

/// The same choice for every pair, but for pairs of `first`, where it is not {0, 0}: the very
/// first.
class PairsPolicy final : public RankPolicy {
 public:
  PairsPolicy(std::vector<Ranks> of_level, Ranks first)
      : of_level_(std::move(of_level)), first_(first) {}
  std::vector<Ranks> decide(const LayerObservation& o) override {
    std::vector<Ranks> ranks;
    for (int64_t i = 0; i < o.items(); ++i) {
      ranks.push_back(of_level_[static_cast<size_t>(o.tree.run_of(i % o.pair_count()).level)]);
    }
    ranks.front() = first_.qk > 0 ? first_ : ranks.front();
    return ranks;
  }
  std::string describe() const override { return "pairs by level"; }

 private:
  std::vector<Ranks> of_level_;
  Ranks first_;
};

/// What is measured at one length.
struct Case {
  Inputs in;
  at::Tensor grad;  ///< of the output; undefined: forward passes alone
};

/// Measures one shape at several lengths.
class Rig {
 public:
  Rig(const Shape& shape, int64_t longest, at::Device device, at::ScalarType dtype)
      : geometry(geometry_flags()),
        ranks(bucket_flags(device, shape.head_dim)),
        inputs_(random_inputs(shape.heads, shape.groups, longest, shape.head_dim, FLAGS_seed)
                    .to(device, dtype)) {
    // What bases hold does not change how long they take.
    inputs_.start = at::randn({1, shape.groups, 2, shape.head_dim, shape.head_dim}).to(device);
  }

  Case of_length(int64_t length) const {
    Inputs in = inputs_.prefix(length);
    const at::Tensor grad = FLAGS_with_backward ? at::randn(in.q.sizes(), in.q.options())
                                                : at::Tensor();
    return {std::move(in), grad};
  }

  std::shared_ptr<RankPolicy> uniform(int64_t length, Ranks all) const {
    const int64_t d = inputs_.head_dim();
    const bool exact = all.qk == d &&
                       all.v == d;  // would not be low-rank attention; one small pair is
    return std::make_shared<PairsPolicy>(std::vector<Ranks>(levels(length), all),
                                         exact ? Ranks{ranks.front(), ranks.front()} : Ranks{0, 0});
  }

  /// At these ranks with a gate that makes about kExactShare of all entries exact, and how many
  /// those are; `any` false: none.
  std::shared_ptr<RankPolicy> gated(const Inputs& in, Ranks all, bool any,
                                    std::optional<int64_t>& exact_entries) const {
    constexpr float kNone = 2;  // more than a whole row
    const auto at_gate = [&](float gate) {
      return std::make_shared<PairsPolicy>(
          std::vector<Ranks>(levels(in.length()), {all.qk, all.v, gate}), Ranks{0, 0});
    };
    const double entries = static_cast<double>(in.heads() * in.length()) *
                           static_cast<double>(in.length()) / 2;
    const auto exact_under = [&](const std::shared_ptr<RankPolicy>& policy) {
      std::shared_ptr<LayerPlan> plan;
      attend(in, policy, 0, plan);
      return plan->served.exact.size();
    };
    float low = 1e-6F, high = 1;
    for (int step = 0; any && step < 12; ++step) {
      const float middle = std::sqrt(low * high);
      (static_cast<double>(exact_under(at_gate(middle))) > kExactShare * entries ? low
                                                                                 : high) = middle;
    }
    const auto policy = at_gate(any ? high : kNone);
    exact_entries = exact_under(policy);
    return policy;
  }

  at::Tensor attend(const Inputs& in, const std::shared_ptr<RankPolicy>& policy, int64_t layer,
                    std::shared_ptr<LayerPlan>& plan) const {
    LowRankController controller(policy, geometry,
                                 {.update_steps = FLAGS_basis_updates,
                                  .start = in.start.expand({layer + 1, -1, -1, -1, -1})});
    return controller.attend(layer, in.q, in.k, in.v, in.w_o, plan);
  }

  Work work(const Case& at_length, const std::shared_ptr<RankPolicy>& policy,
            int64_t layers = 1) const {
    return [=, this] {
      for (int64_t layer = 0; layer < layers; ++layer) {
        const auto attention = [&](const Inputs& in) {
          std::shared_ptr<LayerPlan> plan;
          return attend(in, policy, layer, plan);
        };
        pass(attention, at_length.in, at_length.grad);
      }
    };
  }
  static Work exact_work(const Case& at_length) {
    return [=] {
      pass([](const Inputs& in) { return exact_attention(in.q, in.k, in.v); }, at_length.in,
           at_length.grad);
    };
  }

  const Geometry geometry;
  const std::vector<int64_t> ranks;

 private:
  size_t levels(int64_t length) const {
    return static_cast<size_t>(BlockTree(length, geometry).num_levels());
  }

  Inputs inputs_;
};

/// Uniform ranks that tell the parts of a price apart: equal ranks, and each kind alone with the
/// other exact.
std::vector<Ranks> measured_ranks(const std::vector<int64_t>& ranks) {
  const int64_t d = ranks.back();
  std::vector<Ranks> result = {{d, d}};
  for (const int64_t rank : ranks) {
    if (rank < d) {
      result.insert(result.end(), {{rank, rank}, {rank, d}, {d, rank}});
    }
  }
  return result;
}

/// Exact attention and all measured ranks at one length.
std::vector<LatencyPoint> measure(const Rig& rig, int64_t length, int64_t rounds,
                                  at::Device device) {
  const Case at_length = rig.of_length(length);
  std::vector<LatencyPoint> points = {{length, std::nullopt, {}, 0}};
  std::vector<Work> work = {Rig::exact_work(at_length)};
  for (const Ranks& ranks : measured_ranks(rig.ranks)) {
    points.push_back({length, ranks, {}, 0});
    work.push_back(rig.work(at_length, rig.uniform(length, ranks)));
  }
  if (FLAGS_gates) {
    at::NoGradGuard no_grad;
    const Ranks ranks{rig.ranks.front(), rig.ranks.front()};
    for (const bool any : {false, true}) {
      points.push_back({length, ranks, {}, 0});
      work.push_back(
          rig.work(at_length, rig.gated(at_length.in, ranks, any, points.back().exact_entries)));
    }
  }
  const auto ms = interleaved_ms(work, rounds, device);
  for (size_t i = 0; i < points.size(); ++i) {
    points[i].ms = median(ms[i]);
  }
  return points;
}

double predicted_ms(const LatencyTable& table, const BlockTree& tree, const Inputs& in,
                    const RankTable& ranks) {
  const CostModel costs = table.cost_model(tree, in.groups(), in.heads() / in.groups(),
                                           in.head_dim());
  double ns = 0;
  for (int64_t layer = 0; layer < ranks.layers(); ++layer) {
    ns += cost_of(costs, tree, ranks, layer);
  }
  return ns / 1e6;
}

/// Any ranks for every KV group and level: nothing that was measured.
RankTable mixed_ranks(const Rig& rig, int64_t groups, int64_t levels, uint64_t seed) {
  std::mt19937_64 random(seed);
  RankTable table(1, groups, levels, {rig.ranks.back(), rig.ranks.back()});
  for (int64_t i = 0; i < groups * levels; ++i) {
    table.at(0, i / levels, i % levels) = {rig.ranks[random() % rig.ranks.size()],
                                           rig.ranks[random() % rig.ranks.size()]};
  }
  return table;
}

/// How far predictions are off for allocations that were not measured: mixed ones, and those of the
/// calibration --policy, if there is one, of all its layers.
void check_predictions(const Rig& rig, const LatencyTable& table,
                       const std::vector<int64_t>& lengths, at::Device device) {
  std::vector<std::vector<std::string>> rows = {
      {"L", "ranks", "ms", "predicted", "error", "of exact", "predicted", "error"}};
  std::optional<Calibration> calibration;
  if (!FLAGS_policy.empty()) {
    calibration = read_calibration();
    check_geometry(*calibration);
  }
  for (const int64_t length : lengths) {
    const Case at_length = rig.of_length(length);
    const Inputs& in = at_length.in;
    const BlockTree tree(length, rig.geometry);
    std::vector<std::pair<std::string, RankTable>> cases = {
        {"mixed", mixed_ranks(rig, in.groups(), tree.num_levels(), FLAGS_seed)}};
    if (calibration) {
      check(ErrorKind::kUsage,
            calibration->head_dim() == in.head_dim() && calibration->groups() == in.groups(),
            "--policy=", FLAGS_policy, " is of head_dim ", calibration->head_dim(), " and ",
            calibration->groups(), " KV groups, measured were ", in.head_dim(), " and ",
            in.groups());
      for (const LatencyTable* by : {static_cast<const LatencyTable*>(nullptr), &table}) {
        try {
          cases.emplace_back(
              c10::str("dp ", FLAGS_rank_budget, by != nullptr ? " of ms" : " of operations"),
              allocate(*calibration, tree,
                       {.budget = FLAGS_rank_budget,
                        .heads_per_group = in.heads() / in.groups(),
                        .buckets = rig.ranks,
                        .update_steps = FLAGS_basis_updates,
                        .latency = by})
                  .table);
        } catch (const Error& error) {  // cannot be met at this length
          std::cout << error.what() << "\n";
        }
      }
    }
    std::vector<Work> work = {Rig::exact_work(at_length)};
    for (const auto& [name, ranks] : cases) {
      work.push_back(rig.work(at_length, make_table_policy(ranks, name), ranks.layers()));
    }
    const auto ms = interleaved_ms(work, FLAGS_repeats, device);
    const double exact = median(ms[0]),
                 predicted_exact = table
                                       .cost_model(tree, in.groups(), in.heads() / in.groups(),
                                                   in.head_dim())
                                       .exact /
                                   1e6;
    const auto add = [&](const std::string& name, double layers, double measured,
                         double predicted) {
      rows.push_back({std::to_string(length), name});
      const auto compare = [&](double a, double b) {
        rows.back().insert(rows.back().end(), {format("%.3f", a), format("%.3f", b),
                                               format("%+.1f %%", 100 * (b / a - 1))});
      };
      compare(measured, predicted);
      compare(measured / (layers * exact), predicted / (layers * predicted_exact));
    };
    add("exact", 1, exact, predicted_exact);
    for (size_t i = 0; i < cases.size(); ++i) {
      add(cases[i].first, static_cast<double>(cases[i].second.layers()), median(ms[i + 1]),
          predicted_ms(table, tree, in, cases[i].second));
    }
  }
  std::cout << "\npredictions for ranks that were not measured\n";
  print_table(std::cout, rows);
}

void print_latencies(const LatencyTable& table, const Geometry& geometry) {
  const BlockTree tree(table.seq_len, geometry);
  std::vector<std::vector<std::string>> rows = {{"level", "pair of"}};
  for (const char* kind : {"scores ", "values "}) {
    for (const int64_t rank : table.ranks) {
      rows[0].push_back(kind + std::to_string(rank));
    }
  }
  const CostModel costs = table.cost_model(tree, 1, table.key.heads_per_group, table.key.head_dim);
  for (int64_t level = 0; level < tree.num_levels(); ++level) {
    const PairRun& run = tree.run_of(tree.pair_index(level, 0));
    rows.push_back({std::to_string(level), std::to_string(run.key_rows)});
    for (const FarKind kind : {FarKind::kScores, FarKind::kValues}) {
      for (const int64_t rank : table.ranks) {
        rows.back().push_back(format("%.4f", costs.pair(run, kind, rank) / 1e6));
      }
    }
  }
  std::cout << "\none KV group at L = " << table.seq_len << " [ms]: exact attention "
            << format("%.3f", costs.exact / 1e6) << ", what no rank changes "
            << format("%.3f", costs.fixed / 1e6)
            << "; one pair at a rank of its scores and of its values\n";
  print_table(std::cout, rows);
}

void print_fit(const LatencyTable& table, const std::vector<LatencyPoint>& points, const Rig& rig) {
  double squares = 0, worst = 0;
  int64_t count = 0;
  for (const LatencyPoint& p : points) {
    const BlockTree tree(p.seq_len, rig.geometry);
    const CostModel costs = table.cost_model(tree, table.groups, table.key.heads_per_group,
                                             table.key.head_dim);
    double ns = p.ranks ? cost_of(costs, tree,
                                  RankTable(1, table.groups, tree.num_levels(), *p.ranks), 0)
                        : costs.exact;
    for (const PairRun& run : tree.runs()) {
      if (p.exact_entries) {
        ns += costs.gated(run) * static_cast<double>(run.count * table.groups);
      }
    }
    const PairRun& run = tree.runs().front();
    ns += static_cast<double>(p.exact_entries.value_or(0)) * costs.exact_entries(run) /
          static_cast<double>(table.key.heads_per_group * run.query_rows * run.key_rows);
    const double error = ns / 1e6 / p.ms - 1;
    squares += error * error;
    worst = std::abs(error) > std::abs(worst) ? error : worst;
    ++count;
  }
  std::cout << "fitted to " << count << " measurements: relative error "
            << format("%.1f %%", 100 * std::sqrt(squares / static_cast<double>(count)))
            << " (root mean square), " << format("%+.1f %%", 100 * worst) << " at worst\n";
}

}  // namespace

ExitCode latency(const Environment& environment) {
  require("latency", FLAGS_latency);
  check_outputs(environment, {"latency"});
  const Shape shape = shape_flags();
  const at::Device device = device_flag(environment);
  LatencyTable table;
  table.key = latency_key(device, shape.head_dim, shape.heads / shape.groups);
  table.backward = FLAGS_with_backward;
  table.groups = shape.groups;
  table.sink_tokens = FLAGS_sink_tokens;
  check(ErrorKind::kUsage, FLAGS_basis_updates >= BasisOptions::kSolve,
        "--basis_updates must be at least -1, got ", FLAGS_basis_updates);
  check(ErrorKind::kUsage, FLAGS_seq_len >= 4 * geometry_flags().near_block,
        "--seq_len=", FLAGS_seq_len, " must be at least 4 times --near_block=", FLAGS_near_block,
        ": distances are told apart by lengths from two blocks on");
  const Rig rig(shape, FLAGS_seq_len, device, dtype_flag("dtype", FLAGS_dtype));
  table.ranks = rig.ranks;
  check(ErrorKind::kUsage, rig.ranks.size() > 1, "a head_dim of ", shape.head_dim,
        " has no smaller ranks to measure");
  print_banner(std::cout, "drrl-bench latency",
               {{"shape", c10::str(shape.heads, " heads in ", shape.groups, " KV groups of d = ",
                                   shape.head_dim, ", up to ", FLAGS_seq_len, " tokens")},
                {"passes", FLAGS_with_backward ? "forward and backward" : "forward"},
                {"device", table.key.device},
                {"versions", version_line()}});

  constexpr size_t kLengths = 6;
  std::vector<int64_t> lengths;  // ascending
  for (int64_t length = FLAGS_seq_len; length >= 2 * FLAGS_near_block && lengths.size() < kLengths;
       length /= 2) {
    lengths.insert(lengths.begin(), length);
  }
  std::vector<LatencyPoint> points;
  for (const int64_t length : lengths) {
    std::cerr << "L = " << length << "\n";
    const int64_t rounds = FLAGS_repeats *
                           std::min<int64_t>(
                               2, FLAGS_seq_len / length);  // short calls are noisy and cheap
    const auto of_length = measure(rig, length, rounds, device);
    points.insert(points.end(), of_length.begin(), of_length.end());
  }
  table = LatencyTable::fit(std::move(table), points);
  table.save(FLAGS_latency, points);
  print_latencies(table, rig.geometry);
  print_fit(table, points, rig);
  check_predictions(
      rig, table,
      {lengths.end() - std::min<int64_t>(2, static_cast<int64_t>(lengths.size())), lengths.end()},
      device);
  std::cout << "wrote " << FLAGS_latency << std::endl;
  return ExitCode::kSuccess;
}

}  // namespace drrl::bench
