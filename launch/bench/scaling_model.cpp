#include "launch/bench/scaling_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include <nlohmann/json.hpp>

#include "core/attention/flops.h"
#include "core/error.h"
#include "core/io/file_io.h"
#include "core/linalg/basis.h"
#include "core/linalg/least_squares.h"
#include "distributed/attention/context_attention.h"
#include "distributed/attention/context_parallel_bases.h"
#include "distributed/collectives/traffic.h"
#include "distributed/topology/sequence_split.h"
#include "launch/bench/bench.h"
#include "launch/options/options.h"
#include "models/causal_lm/tensor_parallel.h"
#include "models/causal_lm/weights.h"
#include "policy/allocation/cost_model.h"
#include "policy/attention/attention_statistics.h"

namespace drrl::bench {

const std::array<CostName, kCostCount> kCosts = {{
    {"update", "million weights", "gradients and optimizer, for each weight that a process holds",
     "runs with different --model_ sizes, --tp or --sequences"},
    {"layer", "layer", "starting the work of a layer, for each sequence",
     "short and long sequences"},
    {"linear", "Gflop", "linear layers, output head and loss", "runs with different --seq_len"},
    {"exact_attention", "Gflop", "exact attention", "exact attention at short and long sequences"},
    {"lowrank_attention", "Gflop", "near blocks, sinks and far pairs",
     "low-rank attention at short and long sequences"},
    {"bases", "Gflop", "Grams and bases", "low-rank attention without --cp"},
    {"split_exact_attention", "Gflop", "exact attention under --cp",
     "exact attention with --cp, at short and long sequences"},
    {"split_lowrank_attention", "Gflop", "near blocks, sinks and far pairs under --cp",
     "low-rank attention with --cp, at short and long sequences"},
    {"reduce", "MB", "adding up what all_reduce brings, for each byte added",
     "drrl-bench collectives, all_reduce and another operation"},
    {"message", "message", "latency of a message within a node",
     "drrl-bench collectives, small messages too"},
    {"bytes", "MB", "bytes within a node", "drrl-bench collectives, large messages too"},
    {"network_message", "message", "latency of a message between nodes",
     "drrl-bench collectives on several nodes, or --alpha_us"},
    {"network_bytes", "MB", "bytes between nodes",
     "drrl-bench collectives on several nodes, or --gbps"},
}};

namespace {

using Json = nlohmann::ordered_json;

constexpr double kGiga = 1e9, kMega = 1e6;
constexpr double kBackwardShare = 2.0 /
                                  3;  // of a step's work: two products for each of the forward pass
constexpr double kPartWeight = 0.3;   // of measured parts against whole steps: they are less like
                                      // what is predicted
constexpr int64_t kBucketBytes = int64_t{32} << 20,
                  kLossRows = 512;  // as in gradient_reducer.h and causal_lm.h

constexpr bool is_communication(size_t cost) {
  return cost >= kReduce;
}

double messages(const std::string& operation, int64_t members) {
  const double levels = std::ceil(std::log2(static_cast<double>(members)));
  return operation == "all_reduce"   ? 2 * levels
         : operation == "all_to_all" ? static_cast<double>(members - 1)
                                     : levels;
}

/// The members of one of the mesh's groups.
struct Members {
  int64_t count, stride;  // world ranks from one to the next
  bool on_one_node(int64_t processes_per_node) const {
    return count * stride <= processes_per_node;
  }
};

void add_messages(Amounts& to, const std::string& operation, const Members& members,
                  int64_t processes_per_node, double calls, double sent_bytes) {
  const double added = operation == "all_reduce"       ? sent_bytes / 2
                       : operation == "reduce_scatter" ? sent_bytes
                                                       : 0;
  to[kReduce] += added / kMega;
  const bool local = members.on_one_node(processes_per_node);
  to[local ? kMessage : kNetworkMessage] += calls * messages(operation, members.count);
  to[local ? kBytes : kNetworkBytes] += sent_bytes / kMega;
}

/// What a process of a context-parallel group sends for one layer of one sequence.
struct ContextBytes {
  std::vector<double> keys_values, bases;  // by process; keys and values, and in the backward pass
                                           // the gradients of those that came
};

ContextBytes context_bytes(const Workload& w, const SequenceSplit& split, int64_t groups,
                           int64_t rank) {
  const auto members = static_cast<size_t>(split.parts());
  const int64_t d = w.config.head_dim;
  const std::vector<Ranks> ranks(static_cast<size_t>(groups * split.tree().num_pairs()),
                                 Ranks{rank, rank});
  ContextBytes bytes{std::vector<double>(members), std::vector<double>(members)};
  const auto owners = rank < d ? basis_owners(split, ranks, d) : std::vector<int64_t>();
  for (const ContextPart& part : context_parts(split, ranks, d)) {
    const bool low = part.ranks.qk < d;
    const int64_t owner = low ? owners[static_cast<size_t>(part.pair)] : -1;
    for (int64_t member = 0; member < split.parts(); ++member) {
      const int64_t keys = split.rows_of(member, part.keys).count;
      const bool queries = split.rows_of(member, part.queries).count > 0;
      for (int64_t other = 0; keys > 0 && other < split.parts(); ++other) {
        if (other != member && split.rows_of(other, part.queries).count > 0) {
          const auto size = static_cast<double>(groups * keys * 2 * part.ranks.qk *
                                                w.element_bytes);
          bytes.keys_values[static_cast<size_t>(member)] += size;
          bytes.keys_values[static_cast<size_t>(other)] += size;
        }
      }
      if (low && member != owner) {
        bytes.bases[static_cast<size_t>(member)] += keys > 0 ? static_cast<double>(3 * groups * d *
                                                                                   (d + 1) / 2) *
                                                                   4
                                                             : 0;  // triangles of Grams, in fp32
        const int64_t columns = (keys > 0 ? 2 * part.ranks.qk : 0) +
                                (queries ? 2 * part.ranks.qk + std::min(kResidualColumns, d) : 0);
        bytes.bases[static_cast<size_t>(owner)] += static_cast<double>(groups * d * columns *
                                                                       w.element_bytes);
      }
    }
  }
  return bytes;
}

/// Operations of a layer's attention for one sequence, forward and backward.
struct AttentionWork {
  double attention = 0, bases = 0,
         first_bases = 0;  // first_bases: decompositions of the first pair, where updates start
};

AttentionWork attention_work(const Workload& w, const BlockTree& tree, int64_t groups,
                             int64_t rank) {
  const int64_t d = w.config.head_dim, per_group = w.config.heads_per_group(),
                heads = groups * per_group;
  if (rank == d) {
    return {exact_attention_flops(1, heads, tree.sequence_length(), d, /*with_backward=*/true), 0,
            0};
  }
  const AttentionFlops fixed = exact_part_flops(tree, 1, heads, groups, d, /*with_backward=*/true);
  const bool updated = w.basis_updates >= 0 && (!w.first_block_bases || w.geometry.near_block >= d);
  const CostModel prices = flops_cost_model(tree, groups, per_group, d,
                                            updated ? w.basis_updates : -1);
  AttentionWork work{fixed.near + fixed.sinks,
                     fixed.grams + output_gram_flops(w.config.hidden_size, heads, d), 0};
  for (const PairRun& run : tree.runs()) {
    for (const FarKind kind : {FarKind::kScores, FarKind::kValues}) {
      const auto pairs = static_cast<double>(run.count * groups);
      work.attention += pairs *
                        far_pair_flops(run, kind, rank, per_group, d, /*with_backward=*/true)
                            .total();
      work.bases += pairs * (prices.pair(run, kind, rank) -
                             far_pair_flops(run, kind, rank, per_group, d, /*with_backward=*/false)
                                 .total());
    }
  }
  work.first_bases = updated && w.first_block_bases
                         ? static_cast<double>(2 * groups) * basis_solve_flops(d)
                         : 0;
  return work;
}

/// Weights that a process holds, and those that rows are multiplied by.
std::pair<double, double> weights_of(const ModelConfig& config, int64_t tp) {
  const ParameterNames& names = parameter_names(config);
  const auto is = [](const std::string& name, const char* of) {
    return of != nullptr && name == std::string(of) + ".weight";
  };
  double all = 0, multiplied = 0;
  for (const ParameterLayout& layout :
       parameter_layouts(config, tp, 0)) {  // the first process has the largest share
    const double count = std::accumulate(layout.shape.begin(), layout.shape.end(), 1.0,
                                         std::multiplies<>());
    all += count;
    const bool looked_up = is(layout.name, names.positions) ||
                           (is(layout.name, names.embedding) && !config.tie_word_embeddings);
    multiplied += layout.shape.size() > 1 && !looked_up ? count : 0;
  }
  return {all, multiplied};
}

// How many times longer all takes as cores are shared.
double sharing(const Demand& demand, double waiting) {
  return demand.cores_shared * (demand.out_of_turn ? 1 + waiting : 1);
}

// What a step of one process is made of, beside the workload itself.
struct Shares {
  explicit Shares(const Workload& w)
      : tp(w.shape.tp),
        dp(w.shape.dp),
        cp(w.shape.cp),
        groups(partition(w.config.num_key_value_heads, tp, 0).count),
        tree(w.seq_len, w.geometry),
        rank(tree.num_pairs() == 0 ? w.config.head_dim : std::min(w.rank, w.config.head_dim)),
        low(rank < w.config.head_dim),
        sequences(static_cast<double>(partition(w.sequences, dp, 0).count)),
        passes(sequences * static_cast<double>(w.config.num_hidden_layers)),
        rows(w.seq_len) {
    if (cp > 1) {
      split.emplace(tree, cp);
      rows = 0;
      for (int64_t part = 0; part < cp; ++part) {
        rows = std::max(rows, split->rows(part));
      }
    }
  }

  // First-pair problems of a sequence, and those that a context-parallel process solves.
  int64_t first_problems() const { return 2 * groups; }
  double first_problems_of(int64_t process) const {
    return static_cast<double>(partition(first_problems(), cp, process).count);
  }

  int64_t tp, dp, cp, groups;
  BlockTree tree;
  int64_t rank;
  bool low;
  double sequences, passes;  // passes: through a layer
  int64_t rows;              // of a sequence, on the process with most
  std::optional<SequenceSplit> split;
};

void add_work(const Shares& s, double multiplied, const AttentionWork& attention, Amounts& a) {
  a[kLayer] = s.passes;
  a[kLinear] = s.sequences * 6 * static_cast<double>(s.rows) * multiplied / kGiga;
  a[s.cp > 1 ? (s.low ? kSplitLowRank : kSplitExact)
             : (s.low ? kLowRank : kExact)] = s.passes * attention.attention /
                                              static_cast<double>(s.cp) / kGiga;
  a[kBases] = s.passes *
              (attention.bases / static_cast<double>(s.cp) +
               attention.first_bases * s.first_problems_of(0) /
                   static_cast<double>(s.first_problems())) /
              kGiga;
}

void add_all_reduce(const Workload& w, Demand& demand, Amounts& to, const Members& members,
                    double calls, double bytes) {
  if (members.count > 1) {
    const double sent = calls * bytes * bus_factor("all_reduce", members.count);
    add_messages(to, "all_reduce", members, w.processes_per_node, calls, sent);
    demand.sent_bytes += sent;
  }
}

// Activations and losses over tensor-parallel processes, sums and gradients over data.
void add_sums(const Workload& w, const Shares& s, double weights, Demand& demand) {
  const Members of_tp{s.tp, 1}, of_data{s.dp * s.cp, s.tp};
  Amounts& a = demand.amounts;
  const double activations = static_cast<double>(s.rows * w.config.hidden_size * w.element_bytes);
  add_all_reduce(w, demand, a, of_tp, 4 * s.passes + 2 * s.sequences,
                 activations);  // two each way of a layer, embedding, gradient of the head's input
  const double chunks = std::ceil(static_cast<double>(s.rows) / kLossRows);
  add_all_reduce(
      w, demand, a, of_tp, 2 * s.sequences * chunks,
      12 * static_cast<double>(s.rows) / (2 * chunks));  // the softmax: 4 and 8 bytes for each row
  // Bytes: loss, norm and figures of a step.
  const double sums = 8 * static_cast<double>(5 + AttentionStatistics().counts().size());
  add_all_reduce(w, demand, a, of_tp, 1, sums);
  add_all_reduce(w, demand, a, of_data, 1, sums);
  const double buckets = std::ceil(4 * weights / static_cast<double>(kBucketBytes));
  add_all_reduce(w, demand, demand.gradients, of_data, buckets, 4 * weights / buckets);
}

// Keys, values and bases of split sequences.
void add_context(const Workload& w, const Shares& s, bool first_bases, Demand& demand) {
  const Members of_cp{s.cp, s.tp};
  Amounts& a = demand.amounts;
  const auto add = [&](const char* operation, double calls, double most, double own) {
    add_messages(a, operation, of_cp, w.processes_per_node, calls, most);
    demand.sent_bytes += own;
  };
  const ContextBytes bytes = context_bytes(w, *s.split, s.groups, s.rank);
  const auto most = [](const std::vector<double>& by_process) {
    return *std::max_element(by_process.begin(), by_process.end());
  };
  add("all_to_all", s.passes * 2, s.passes * most(bytes.keys_values),
      s.passes * bytes.keys_values.front());
  const double digests = s.sequences * 8 *
                         static_cast<double>(s.cp - 1);  // of rank decisions, before each pass
  add("all_gather", s.sequences, digests, digests);
  if (!s.low) {
    return;
  }
  add("all_to_all", s.passes * 2, s.passes * most(bytes.bases), s.passes * bytes.bases.front());
  if (w.cores_per_node > 0) {  // the ranks at which pairs are attended: some may turn out exact
    add_all_reduce(w, demand, a, of_cp, s.passes,
                   static_cast<double>(s.groups * s.tree.num_pairs()) * 2 * sizeof(float));
  }
  if (first_bases) {
    const int64_t d = w.config.head_dim;
    const double own = s.first_problems_of(0);
    const double scattered = static_cast<double>(d * (d + 1) * 4) *
                             (static_cast<double>(s.first_problems()) -
                              own);  // two triangles each, in fp32
    const double gathered = static_cast<double>(d * d * 4 * (s.cp - 1)) * own;
    const double sent = s.passes * (scattered + gathered);
    add("all_to_all", s.passes * 2, sent, sent);
  }
}

void add_cores(const Workload& w, const Shares& s, Demand& demand) {
  if (w.cores_per_node == 0) {
    return;
  }
  const auto cores = static_cast<double>(w.cores_per_node),
             threads = static_cast<double>(w.threads);
  const double wanted = static_cast<double>(std::min(w.processes_per_node, w.world())) * threads;
  demand.cores_shared = std::max(1.0, wanted / cores);
  demand.out_of_turn = demand.cores_shared > 1 && s.tp * s.cp > 1;
  demand.busy_others = cores > threads ? (std::min(wanted, cores) - threads) / (cores - threads)
                                       : 0;
}

}  // namespace

Demand demand_of(const Workload& w) {
  check(ErrorKind::kUsage, w.shape.tp <= w.config.num_key_value_heads,
        "the scaling model knows no processes that share a KV head: tensor-parallel size ",
        w.shape.tp, " is greater than the model's ", w.config.num_key_value_heads, " KV heads");
  const Shares shares(w);
  const auto [weights, multiplied] = weights_of(w.config, shares.tp);
  const AttentionWork attention = attention_work(w, shares.tree, shares.groups, shares.rank);
  Demand demand;
  demand.amounts[kUpdate] = weights / kMega;
  demand.hiding = kBackwardShare / shares.sequences;
  add_work(shares, multiplied, attention, demand.amounts);
  add_sums(w, shares, weights, demand);
  if (shares.cp > 1) {
    add_context(w, shares, attention.first_bases > 0, demand);
  }
  add_cores(w, shares, demand);
  return demand;
}

double StepModel::pace(const Equation& equation) const {
  if (equation.yardstick_ms <= 0 || yardstick_ms <= 0) {
    return 1;
  }
  const double pace = equation.yardstick_ms / yardstick_ms;
  check(ErrorKind::kUsage, pace < 8 && pace > 1.0 / 8, equation.name, ": its yardstick took ",
        equation.yardstick_ms, " ms, usual among the runs are ", yardstick_ms,
        ": runs of another machine or of another version of drrl-bench scaling do not go together");
  return pace;
}

StepModel StepModel::fit(const std::vector<Equation>& equations) {
  std::vector<size_t> used;
  StepModel best;
  for (size_t i = 0; i < kCostCount; ++i) {
    if (std::any_of(equations.begin(), equations.end(), [&](const Equation& e) {
          return e.demand.amounts[i] + e.demand.gradients[i] > 0;
        })) {
      used.push_back(i);
      best.sources[i] = Source::kMeasured;
    }
  }
  check(ErrorKind::kUsage, equations.size() >= used.size(), equations.size(),
        " measured times for ", used.size(), " costs: give more runs with --runs");
  std::vector<double> yardsticks;
  for (const Equation& e : equations) {
    if (e.yardstick_ms > 0) {
      yardsticks.push_back(e.yardstick_ms);
    }
  }
  best.yardstick_ms = yardsticks.empty() ? 0 : median(yardsticks);
  const auto rows_at = [&](double contention, double overlap, double waiting) {
    std::vector<std::vector<double>> rows;
    for (const Equation& e : equations) {
      const double factor = e.weight * best.pace(e) * sharing(e.demand, waiting) / e.ms;
      std::vector<double> row;
      for (const size_t i : used) {
        row.push_back(factor *
                      (is_communication(i)
                           ? e.demand.amounts[i] + (1 - overlap) * e.demand.gradients[i]
                           : e.demand.amounts[i] * (1 + contention * e.demand.busy_others)));
      }
      rows.push_back(row);
    }
    return rows;
  };
  // 0, 0.05 .. 1 where the runs tell
  const auto range = [&](auto&& of) {
    const auto [low, high] = std::minmax_element(
        equations.begin(), equations.end(),
        [&](const Equation& a, const Equation& b) { return of(a) < of(b); });
    std::vector<double> values = {0};
    for (int i = 1; of(*low) < of(*high) && i <= 20; ++i) {
      values.push_back(0.05 * i);
    }
    return values;
  };
  const auto turn = [](const Equation& e) { return e.demand.out_of_turn ? 1 : 0; };
  const auto gradients = [](const Equation& e) {
    return std::accumulate(e.demand.gradients.begin(), e.demand.gradients.end(), 0.0);
  };
  std::vector<double> weights;
  for (const Equation& e : equations) {
    weights.push_back(e.weight);
  }
  double least = std::numeric_limits<double>::infinity();
  for (const double contention : range([](const Equation& e) { return e.demand.busy_others; })) {
    for (const double overlap : range(gradients)) {
      for (const double waiting : range(turn)) {
        const auto rows = rows_at(contention, overlap, waiting);
        const auto costs = nonnegative_least_squares(rows, weights);
        double squares = 0;
        for (size_t m = 0; m < rows.size(); ++m) {
          const double error = std::inner_product(rows[m].begin(), rows[m].end(), costs.begin(),
                                                  -weights[m]);
          squares += error * error;
        }
        if (squares < least) {
          least = squares;
          best.contention = contention;
          best.overlap = overlap;
          best.waiting = waiting;
          for (size_t i = 0; i < used.size(); ++i) {
            best.costs[used[i]] = costs[i];
          }
        }
      }
    }
  }

  // What part of a column no combination of the others makes.
  const auto rows = rows_at(best.contention, best.overlap, best.waiting);
  at::Tensor a = at::empty({static_cast<int64_t>(rows.size()), static_cast<int64_t>(used.size())},
                           at::kDouble);
  for (size_t m = 0; m < rows.size(); ++m) {
    a[static_cast<int64_t>(m)].copy_(at::tensor(rows[m], at::kDouble));
  }
  constexpr double kLeastOwn = 0.01;
  for (int64_t i = 0; used.size() > 1 && i < a.size(1); ++i) {
    const at::Tensor column = a.narrow(1, i, 1);
    const at::Tensor others = std::get<0>(
        at::linalg_qr(at::cat({a.narrow(1, 0, i), a.narrow(1, i + 1, a.size(1) - i - 1)}, 1)));
    const double own = ((column - at::mm(others, at::mm(others.t(), column))).norm() /
                        column.norm())
                           .item<double>();
    const CostName& cost = kCosts[used[static_cast<size_t>(i)]];
    check(ErrorKind::kUsage, own > kLeastOwn, "these runs do not tell the cost '", cost.key, "' (",
          cost.meaning, ") from the others: add ", cost.told_by);
  }
  return best;
}

StepMs StepModel::predict(const Demand& demand) const {
  double work = 0, exposed = 0, gradients = 0;
  for (size_t i = 0; i < kCostCount; ++i) {
    check(ErrorKind::kUsage,
          sources[i] != Source::kUnknown || demand.amounts[i] + demand.gradients[i] == 0,
          "no run that was given has measured '", kCosts[i].key, "' (", kCosts[i].meaning,
          "): add ", kCosts[i].told_by);
    (is_communication(i) ? exposed : work) += costs[i] * demand.amounts[i];
    gradients += costs[i] * demand.gradients[i];
  }
  work *= 1 + contention * demand.busy_others;
  const double hidden = overlap * std::min(gradients, demand.hiding * work);
  const double s = sharing(demand, waiting);
  return {s * work, s * exposed, s * (gradients - hidden)};
}

namespace {

/// Checked reads of one file.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& path) : path_(path) {}

  Json root() const {
    Json json = Json::parse(read_text(path_, ErrorKind::kUsage), nullptr,
                            /*allow_exceptions=*/false);
    check(ErrorKind::kUsage, json.is_object(), path_, " is not a JSON object");
    return json;
  }
  const Json& field(const Json& of, const char* name) const {
    check(ErrorKind::kUsage, of.is_object() && of.contains(name), path_, " has no \"", name,
          "\": was it written by this version of drrl-bench?");
    return of[name];
  }
  std::string text(const Json& of, const char* name) const {
    const Json& value = field(of, name);
    check(ErrorKind::kUsage, value.is_string(), path_, ": \"", name, "\" is ", quoted(value.dump()),
          ", expected a text");
    return value.get<std::string>();
  }
  double number(const Json& of, const char* name, double least = 0) const {
    const Json& value = field(of, name);
    check(ErrorKind::kUsage, value.is_number() && value.get<double>() >= least, path_, ": \"", name,
          "\" is ", quoted(value.dump()), ", expected a number from ", least);
    return value.get<double>();
  }
  int64_t count(const Json& of, const char* name) const {
    return static_cast<int64_t>(number(of, name, 1));
  }
  /// Options are kept as text.
  int64_t option(const Json& of, const char* name) const {
    const std::string value = text(field(of, "options"), name);
    char* end = nullptr;
    const int64_t number = std::strtoll(value.c_str(), &end, 10);
    check(ErrorKind::kUsage, !value.empty() && *end == '\0', path_, ": option \"", name, "\" is ",
          quoted(value), ", expected a whole number");
    return number;
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

void check_setting(const Reader& in, const Json& run, std::optional<std::string>& setting) {
  const Json own = {{"device", in.text(run, "device")},
                    {"cpu", in.text(run, "cpu")},
                    {"cores_per_node", in.count(run, "cores_per_node")},
                    {"threads", in.count(run, "threads")},
                    {"versions", in.text(run, "versions")}};
  if (!setting) {
    setting = own.dump();
  }
  const Json expected = Json::parse(*setting);
  for (const auto& [key, value] : expected.items()) {
    check(ErrorKind::kUsage, own[key] == value, in.path(), ": \"", key, "\" is ", own[key].dump(),
          ", that of the first file is ", value.dump(),
          ": runs of different machines, settings or versions do not go together");
  }
}

// Runs of version 0.1 say "full".
bool exact_run(const std::string& attention) {
  return attention == "exact" || attention == "full";
}

Workload workload_of(const Reader& in, const Json& run) {
  const Json& options = in.field(run, "options");
  Workload w;
  w.config = ModelConfig::parse(in.field(run, "config").dump(), in.path().string());
  w.shape = {.tp = in.count(run, "tp"), .dp = in.count(run, "dp"), .cp = in.count(run, "cp")};
  w.seq_len = in.option(run, "seq_len");
  w.sequences = in.count(run, "sequences_per_step");
  w.rank = exact_run(in.text(options, "attention")) ? w.config.head_dim : in.option(run, "rank");
  w.geometry = {in.option(run, "near_block"), in.option(run, "sink_tokens")};
  w.basis_updates = in.option(run, "basis_updates");
  w.first_block_bases = in.text(options, "policy").empty();
  w.element_bytes = in.text(options, "dtype") == "bf16" ? 2 : 4;
  w.processes_per_node = in.count(run, "processes_per_node");
  w.threads = in.count(run, "threads");
  w.cores_per_node = in.text(run, "device") == "cpu" ? in.count(run, "cores_per_node") : 0;
  return w;
}

void add_run(const Reader& in, const Json& run, Measured& to) {
  const Workload w = workload_of(in, run);
  const Demand demand = demand_of(w);
  const std::string name = c10::str(
      w.rank < w.config.head_dim ? c10::str("rank ", w.rank) : "exact", ", L ", w.seq_len, ", ",
      w.sequences, " seq., tp ", w.shape.tp, " cp ", w.shape.cp, " dp ", w.shape.dp);
  const Json& ranks = in.field(run, "ranks");
  check(ErrorKind::kUsage, ranks.is_array() && !ranks.empty(), in.path(), ": \"ranks\" is ",
        quoted(ranks.dump()), ", expected an entry for each process");
  const double sent = in.number(ranks[0], "sent_bytes");
  check(ErrorKind::kUsage, std::abs(demand.sent_bytes - sent) <= 0.01 * sent + 1, in.path(), ": ",
        name, ": process 0 sent ", sent, " bytes in a step, where ", demand.sent_bytes,
        " are counted: it was measured by another version, or with options that are not modelled");
  to.workloads.push_back(w);
  const Json& steps = in.field(run, "steps");
  check(ErrorKind::kUsage, steps.is_array() && !steps.empty(), in.path(), ": \"steps\" is ",
        quoted(steps.dump()), ", expected an entry for each");
  std::vector<Equation> measured;
  double yardstick_ms = 0;  // of all steps together
  for (const Json& step : steps) {
    const double yardstick = in.field(step, "yardstick_ms").is_null()
                                 ? 0
                                 : in.number(step, "yardstick_ms", 1e-3);
    measured.push_back({name, demand, in.number(step, "ms", 1e-3), 1, yardstick});
    yardstick_ms += yardstick / static_cast<double>(steps.size());
  }
  to.equations.push_back(medians(measured).front());
  if (w.shape.cp == 1 && demand.amounts[kBases] > 0 && !in.field(ranks[0], "basis_ms").is_null()) {
    Demand bases{.busy_others = demand.busy_others,
                 .cores_shared = demand.cores_shared,
                 .out_of_turn = demand.out_of_turn};
    bases.amounts[kBases] = demand.amounts[kBases];
    to.equations.push_back({name + ": bases", bases, in.number(ranks[0], "basis_ms", 1e-3),
                            kPartWeight, yardstick_ms});
  }
}

void add_collectives(const Reader& in, const Json& json, Measured& to) {
  const std::string group = in.text(json, "group");
  const int64_t tp = in.option(json, "tp"), cp = in.option(json, "cp"),
                node = in.count(json, "processes_per_node");
  const std::map<std::string, int64_t> strides = {
      {"world", 1}, {"tp", 1}, {"cp", tp}, {"data", tp}, {"dp", tp * cp}};
  check(ErrorKind::kUsage, strides.contains(group), in.path(), ": \"group\" is ", quoted(group),
        ", expected world, tp, cp, dp or data");
  const double cores = in.number(json, "cores_per_node");
  for (const Json& row : in.field(json, "results")) {
    const std::string operation = in.text(row, "operation");
    const Members members{in.count(row, "members"), strides.at(group)};
    const double bytes = in.number(row, "bytes");
    Equation e{c10::str(operation, " of ", bytes, " bytes, ", members.count, " processes"),
               {},
               in.number(row, "time_us", 1e-6) / 1e3,
               kPartWeight};
    add_messages(e.demand.amounts, operation, members, node, 1,
                 bytes * bus_factor(operation, members.count));
    e.demand.cores_shared = in.text(json, "device") == "cpu"
                                ? std::max(1.0, static_cast<double>(node) / cores)
                                : 1;
    to.equations.push_back(std::move(e));
  }
}

}  // namespace

std::vector<Equation> medians(const std::vector<Equation>& equations) {
  std::vector<std::vector<Equation>> runs;
  for (const Equation& e : equations) {
    const auto same = std::find_if(runs.begin(), runs.end(), [&](const auto& run) {
      return run[0].name == e.name && run[0].demand == e.demand;
    });
    same == runs.end() ? runs.push_back({e}) : same->push_back(e);
  }
  std::vector<Equation> result;
  for (std::vector<Equation>& run : runs) {
    std::sort(run.begin(), run.end(),
              [](const Equation& a, const Equation& b) { return a.paced() < b.paced(); });
    result.push_back(run[(run.size() - 1) / 2]);
  }
  return result;
}

Measured read_measured(const std::filesystem::path& path, std::optional<std::string>& setting) {
  const Reader in(path);
  const Json json = in.root();
  Measured file;
  if (json.contains("runs")) {
    for (const Json& run : json["runs"]) {
      check_setting(in, run, setting);
      add_run(in, run, file);
    }
    return file;
  }
  const std::string benchmark = in.text(json, "benchmark");
  check(ErrorKind::kUsage, benchmark == "scaling" || benchmark == "collectives", path,
        " is of drrl-bench ", benchmark,
        ", expected one of drrl-bench scaling, launch/bench/scaling.sh or drrl-bench collectives");
  check_setting(in, json, setting);
  benchmark == "scaling" ? add_run(in, json, file) : add_collectives(in, json, file);
  return file;
}

void write_measured(const std::filesystem::path& path, const nlohmann::ordered_json& json) {
  write_text(path, json.dump(2) + "\n", [](const std::filesystem::path& written) {
    std::optional<std::string> setting;
    read_measured(written, setting);
  });
}

}  // namespace drrl::bench
