#include "policy/allocation/latency_table.h"

#include <algorithm>
#include <cmath>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/io/file_io.h"
#include "core/linalg/least_squares.h"
#include "distributed/collectives/agreement.h"
#include "policy/rank_table.h"

namespace drrl {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kFormat = "drrl-latency-2";
constexpr double kNanoseconds = 1e6;  // of a ms

// Where each unknown of the fit stands. What grows with the rank is fitted as steps from rank to
// rank.
struct Columns {
  explicit Columns(size_t low_ranks_in) : low_ranks(low_ranks_in) {}

  size_t low_ranks;  // below head_dim
  size_t per_kind() const { return 3 * low_ranks + 2; }
  size_t fixed(bool row) const { return row ? 1 : 0; }
  size_t setup(size_t kind) const { return 2 + kind * per_kind(); }
  size_t pair(size_t kind, size_t rank) const { return setup(kind) + 1 + rank; }
  size_t row(size_t kind, size_t rank) const { return setup(kind) + 1 + low_ranks + rank; }
  size_t area(size_t kind, size_t rank) const {
    return setup(kind) + 1 + 2 * low_ranks + rank;
  }  // head_dim's too
  size_t gated(bool area) const { return 2 + 2 * per_kind() + (area ? 1 : 0); }
  size_t entry() const { return 4 + 2 * per_kind(); }
  size_t count() const { return 5 + 2 * per_kind(); }
};

size_t index_of(const std::vector<int64_t>& ranks, int64_t rank) {
  const auto found = std::find(ranks.begin(), ranks.end(), rank);
  check(ErrorKind::kUsage, found != ranks.end(), "rank ", rank, " has no latency, expected one of ",
        at::IntArrayRef(ranks));
  return static_cast<size_t>(found - ranks.begin());
}

// How often each unknown is spent in a point of low-rank attention, for one of `groups` KV groups.
std::vector<double> spent_by(const LatencyPoint& point, const LatencyTable& table,
                             const Columns& columns) {
  std::vector<double> spent(columns.count(), 0.0);
  const BlockTree tree(point.seq_len, {table.key.near_block, table.sink_tokens});
  spent[columns.fixed(false)] = 1;
  spent[columns.fixed(true)] = static_cast<double>(point.seq_len);
  const size_t chosen[] = {index_of(table.ranks, point.ranks->qk),
                           index_of(table.ranks, point.ranks->v)};
  for (const PairRun& run : tree.runs()) {
    const double count = static_cast<double>(run.count),
                 rows = count * static_cast<double>(run.query_rows + run.key_rows) / 2;
    const double area = count * static_cast<double>(run.query_rows) *
                        static_cast<double>(run.key_rows);
    for (size_t kind = 0; kind < 2; ++kind) {
      for (size_t rank = 0; rank <= chosen[kind]; ++rank) {
        spent[columns.area(kind, rank)] += area;
        if (chosen[kind] < columns.low_ranks) {
          spent[columns.pair(kind, rank)] += count;
          spent[columns.row(kind, rank)] += rows;
        }
      }
    }
    if (point.exact_entries) {
      spent[columns.gated(false)] += rows;
      spent[columns.gated(true)] += area;
    }
  }
  for (size_t kind = 0; kind < 2; ++kind) {
    spent[columns.setup(kind)] = chosen[kind] < columns.low_ranks
                                     ? static_cast<double>(tree.num_levels())
                                     : 0;
  }
  spent[columns.entry()] = static_cast<double>(point.exact_entries.value_or(0)) /
                           static_cast<double>(table.groups);
  return spent;
}

LatencyCurve fit_exact(const std::vector<LatencyPoint>& points, double groups) {
  std::vector<std::vector<double>> rows;
  for (const LatencyPoint& p : points) {
    if (!p.ranks) {
      const double of_ms = groups / p.ms, length = static_cast<double>(p.seq_len);
      rows.push_back({of_ms, of_ms * length, of_ms * length * length});
    }
  }
  check(ErrorKind::kUsage, !rows.empty(), "no measurement of exact attention to fit latencies to");
  const auto x = nonnegative_least_squares(rows, std::vector<double>(rows.size(), 1.0));
  return {0, x[0], x[1], x[2]};
}

Json to_json(const LatencyCurve& c) {
  return {{"setup", c.setup}, {"pair", c.pair}, {"row", c.row}, {"area", c.area}};
}

// Checked reads of one file.
class Reader {
 public:
  Reader(const std::filesystem::path& path) : path_(path) {
    const std::string content = read_text(path, ErrorKind::kModel);
    check_nesting(content, path.string(), ErrorKind::kModel);
    root_ = Json::parse(content, nullptr, /*allow_exceptions=*/false);
    check(ErrorKind::kModel, root_.is_object(), path,
          " is not a JSON object: make the latency table with drrl-bench latency");
    const std::string format = text(root_, "format");
    check(ErrorKind::kModel, format == kFormat, path, ": \"format\" is ", quoted(format),
          ", expected \"", kFormat, "\"; make the latency table again");
  }

  const Json& root() const { return root_; }
  const Json& field(const Json& of, const std::string& name) const {
    check(ErrorKind::kModel, of.is_object() && of.contains(name), path_,
          ": the latency table has no \"", name, "\"");
    return of[name];
  }
  std::string text(const Json& of, const std::string& name) const {
    const Json& value = field(of, name);
    expect(value.is_string(), name, value, "a text");
    return value.get<std::string>();
  }
  bool flag(const Json& of, const std::string& name) const {
    const Json& value = field(of, name);
    expect(value.is_boolean(), name, value, "true or false");
    return value.get<bool>();
  }
  int64_t integer(const Json& of, const std::string& name, int64_t least) const {
    const Json& value = field(of, name);
    expect(value.is_number_integer() && value.get<int64_t>() >= least, name, value,
           c10::str("an integer from ", least));
    return value.get<int64_t>();
  }
  double ms(const Json& of, const std::string& which, const std::string& name) const {
    const Json& value = field(of, which);
    expect(value.is_number() && value.get<double>() >= 0 && std::isfinite(value.get<double>()),
           name, value, "a number of ms, not negative");
    return value.get<double>();
  }
  LatencyCurve curve(const Json& of, const std::string& name) const {
    const auto part = [&](const char* which) { return ms(of, which, name + "." + which); };
    return {part("setup"), part("pair"), part("row"), part("area")};
  }
  void expect(bool condition, const std::string& name, const Json& value,
              const std::string& expected) const {
    check(ErrorKind::kModel, condition, path_, ": \"", name, "\" is ", quoted(value.dump()),
          ", expected ", expected);
  }

 private:
  std::filesystem::path path_;
  Json root_;
};

}  // namespace

LatencyTable LatencyTable::fit(LatencyTable table, const std::vector<LatencyPoint>& points) {
  const Columns columns(table.ranks.size() - 1);
  const double of_groups = static_cast<double>(table.groups);
  table.exact = fit_exact(points, of_groups);
  std::vector<std::vector<double>> rows;
  bool gates = false;
  for (const LatencyPoint& p : points) {
    table.seq_len = std::max(table.seq_len, p.seq_len);
    if (p.ranks) {
      gates = gates || p.exact_entries;
      rows.push_back(spent_by(p, table, columns));
      for (double& x : rows.back()) {
        x *= of_groups / p.ms;
      }
    }
  }
  check(ErrorKind::kUsage, !rows.empty(),
        "no measurement of low-rank attention to fit latencies to");
  const auto x = nonnegative_least_squares(rows, std::vector<double>(rows.size(), 1.0));
  table.fixed = {0, x[columns.fixed(false)], x[columns.fixed(true)], 0};
  for (size_t kind = 0; kind < 2; ++kind) {
    auto& curves = kind == 0 ? table.scores : table.values;
    LatencyCurve curve{x[columns.setup(kind)], 0, 0, 0};
    for (size_t rank = 0; rank < columns.low_ranks; ++rank) {
      curve.pair += x[columns.pair(kind, rank)];
      curve.row += x[columns.row(kind, rank)];
      curve.area += x[columns.area(kind, rank)];
      curves.push_back(curve);
    }
    curves.push_back({0, 0, 0, curve.area + x[columns.area(kind, columns.low_ranks)]});
  }
  if (gates) {
    table.gated = LatencyCurve{0, 0, x[columns.gated(false)], x[columns.gated(true)]};
    table.exact_entry = x[columns.entry()];
  }
  return table;
}

CostModel LatencyTable::cost_model(const BlockTree& tree, int64_t layer_groups,
                                   int64_t heads_per_group, int64_t head_dim) const {
  check(ErrorKind::kUsage,
        tree.geometry().near_block == key.near_block && heads_per_group == key.heads_per_group &&
            head_dim == key.head_dim,
        file_, " holds latencies of near_block ", key.near_block, ", ", key.heads_per_group,
        " heads a KV group and head_dim ", key.head_dim, ", not of ", tree.geometry().near_block,
        ", ", heads_per_group, " and ", head_dim);
  std::vector<double> pairs(static_cast<size_t>(tree.num_levels()), 0.0);
  for (const PairRun& run : tree.runs()) {
    pairs[static_cast<size_t>(run.level)] += static_cast<double>(run.count);
  }
  const double ns = kNanoseconds * static_cast<double>(layer_groups);
  CostModel costs;
  costs.exact = ns * exact.of_pair(tree.sequence_length(), tree.sequence_length());
  costs.fixed = ns * fixed.of_pair(tree.sequence_length(), tree.sequence_length());
  costs.pair = [*this, pairs](const PairRun& run, FarKind kind, int64_t rank) {
    const LatencyCurve& curve = (kind == FarKind::kScores ? scores : values)[index_of(ranks, rank)];
    return kNanoseconds * (curve.setup / pairs[static_cast<size_t>(run.level)] +
                           curve.of_pair(run.query_rows, run.key_rows));
  };
  costs.gated = [file = file_, curve = gated](const PairRun& run) {
    check(ErrorKind::kUsage, curve.has_value(), file,
          " holds no latencies of gates; measure them with drrl-bench latency --gates");
    return kNanoseconds * curve->of_pair(run.query_rows, run.key_rows);
  };
  costs.exact_entries = [ms = exact_entry, heads_per_group](const PairRun& run) {
    return kNanoseconds * ms * static_cast<double>(heads_per_group * run.query_rows * run.key_rows);
  };
  return costs;
}

void LatencyTable::check_key(const LatencyKey& expected) const {
  const auto same = [&](const char* field, const auto& mine, const auto& other) {
    check(ErrorKind::kUsage, mine == other, file_, ": \"", field, "\" is ", mine, ", expected ",
          other, "; measure this case with drrl-bench latency");
  };
  same("device", key.device, expected.device);
  same("dtype", key.dtype, expected.dtype);
  same("threads", key.threads, expected.threads);
  same("head_dim", key.head_dim, expected.head_dim);
  same("heads_per_group", key.heads_per_group, expected.heads_per_group);
  same("near_block", key.near_block, expected.near_block);
  same("update_steps", key.update_steps, expected.update_steps);
  same("versions", key.versions, expected.versions);
}

std::string LatencyTable::describe() const {
  return c10::str(backward ? "forward and backward" : "forward", " ms of ", key.device, " (",
                  key.threads > 0 ? c10::str(key.threads, " threads, ") : "", key.dtype, "; ",
                  to_hex(hash_bytes(text({}))), ")");
}

std::string LatencyTable::text(const std::vector<LatencyPoint>& points) const {
  Json json = {{"format", kFormat},
               {"key",
                {{"device", key.device},
                 {"dtype", key.dtype},
                 {"threads", key.threads},
                 {"head_dim", key.head_dim},
                 {"heads_per_group", key.heads_per_group},
                 {"near_block", key.near_block},
                 {"update_steps", key.update_steps},
                 {"versions", key.versions}}},
               {"backward", backward},
               {"kv_groups", groups},
               {"sink_tokens", sink_tokens},
               {"seq_len", seq_len},
               {"ranks", ranks},
               {"exact", to_json(exact)},
               {"fixed", to_json(fixed)},
               {"scores", Json::array()},
               {"values", Json::array()},
               {"gated", gated ? to_json(*gated) : Json()},
               {"exact_entry", gated ? Json(exact_entry) : Json()},
               {"measured", Json::array()}};
  for (size_t i = 0; i < ranks.size(); ++i) {
    json["scores"].push_back(to_json(scores[i]));
    json["values"].push_back(to_json(values[i]));
  }
  for (const LatencyPoint& p : points) {
    Json row = {{"seq_len", p.seq_len},
                {"rank_qk", nullptr},
                {"rank_v", nullptr},
                {"exact_entries", p.exact_entries ? Json(*p.exact_entries) : Json()},
                {"ms", p.ms}};
    if (p.ranks) {
      row["rank_qk"] = p.ranks->qk;
      row["rank_v"] = p.ranks->v;
    }
    json["measured"].push_back(std::move(row));
  }
  return json.dump(1) + "\n";
}

void LatencyTable::save(const std::filesystem::path& file,
                        const std::vector<LatencyPoint>& points) const {
  write_text(file, text(points), [](const std::filesystem::path& written) { load(written); });
}

LatencyTable LatencyTable::load(const std::filesystem::path& file) {
  const Reader reader(file);
  const Json& root = reader.root();
  const Json& key = reader.field(root, "key");
  LatencyTable table;
  table.file_ = file.string();
  table.key = {reader.text(key, "device"),
               reader.text(key, "dtype"),
               reader.integer(key, "threads", 0),
               reader.integer(key, "head_dim", 1),
               reader.integer(key, "heads_per_group", 1),
               reader.integer(key, "near_block", 1),
               reader.integer(key, "update_steps", -1),
               reader.text(key, "versions")};
  table.backward = reader.flag(root, "backward");
  table.groups = reader.integer(root, "kv_groups", 1);
  table.sink_tokens = reader.integer(root, "sink_tokens", 0);
  table.seq_len = reader.integer(root, "seq_len", 1);
  const Json& ranks = reader.field(root, "ranks");
  reader.expect(ranks.is_array() && !ranks.empty(), "ranks", ranks, "a list");
  for (const Json& rank : ranks) {
    const int64_t least = table.ranks.empty() ? 1 : table.ranks.back() + 1;
    reader.expect(rank.is_number_integer() && rank.get<int64_t>() >= least, "ranks", rank,
                  c10::str("ascending integers from ", least));
    table.ranks.push_back(rank.get<int64_t>());
  }
  reader.expect(table.ranks.back() == table.key.head_dim, "ranks", ranks,
                c10::str("ranks up to the head_dim ", table.key.head_dim));
  table.exact = reader.curve(reader.field(root, "exact"), "exact");
  reader.expect(table.exact.of_pair(1, 1) > 0, "exact", root["exact"], "some time");
  table.fixed = reader.curve(reader.field(root, "fixed"), "fixed");
  for (const auto& [name, curves] :
       {std::pair("scores", &table.scores), std::pair("values", &table.values)}) {
    const Json& list = reader.field(root, name);
    reader.expect(list.is_array() && list.size() == table.ranks.size(), name, list,
                  c10::str("a list of ", table.ranks.size(), ", one for each rank"));
    for (const Json& item : list) {
      curves->push_back(reader.curve(item, name));
    }
  }
  if (!reader.field(root, "gated").is_null()) {
    table.gated = reader.curve(root["gated"], "gated");
    table.exact_entry = reader.ms(root, "exact_entry", "exact_entry");
  }
  return table;
}

CostModel cost_model_of(const LatencyTable* latency, const BlockTree& tree, int64_t groups,
                        int64_t heads_per_group, int64_t head_dim, int64_t update_steps) {
  return latency != nullptr
             ? latency->cost_model(tree, groups, heads_per_group, head_dim)
             : flops_cost_model(tree, groups, heads_per_group, head_dim, update_steps);
}

double cost_of(const CostModel& costs, const BlockTree& tree, const RankTable& table,
               int64_t layer) {
  double sum = costs.fixed;
  for (int64_t group = 0; group < table.groups(); ++group) {
    for (const PairRun& run : tree.runs()) {
      const Ranks& ranks = table.at(layer, group, run.level);
      sum += static_cast<double>(run.count) * (costs.pair(run, FarKind::kScores, ranks.qk) +
                                               costs.pair(run, FarKind::kValues, ranks.v));
    }
  }
  return sum;
}

}  // namespace drrl
