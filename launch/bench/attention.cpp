// drrl-bench attention: time, memory and error of low-rank attention over sequence lengths, against
// PyTorch's SDPA in the same run.

#include <algorithm>
#include <cmath>
#include <iostream>
#include <map>

#include <ATen/Parallel.h>
#include <gflags/gflags.h>

#include "core/attention/exact_attention.h"
#include "core/error.h"
#include "core/io/file_io.h"
#include "launch/bench/bench.h"
#include "launch/bench/flags.h"
#include "launch/bench/svg_plot.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/options/policy_flags.h"
#include "launch/runtime/console.h"
#include "launch/runtime/program.h"

DEFINE_string(seq_lens, "1024,2048,4096,8192",
              "attention, model: sequence lengths, a comma list [tokens]");
DEFINE_string(head_dims, "64",
              "attention, latency (one): head dims, a comma list; item i goes with item i of "
              "--heads and --kv_groups");
DEFINE_string(heads, "9",
              "attention, latency (one): query heads, a comma list as long as --head_dims, or one "
              "number for all");
DEFINE_string(kv_groups, "3", "attention, latency (one): KV groups (key/value heads), likewise");
DEFINE_bool(backward, true, "attention: measure forward + backward too");
DEFINE_bool(parts, true,
            "attention: measure what the forward's time is spent on, each part on its own");
DEFINE_int64(layer, 15, "attention: layer of --model whose queries, keys and values are used");
DEFINE_string(
    plot, "",
    "attention: file for a plot of the speed against SDPA over the sequence length, as SVG");

namespace drrl::bench {
namespace {

using Json = nlohmann::ordered_json;

struct Shape {
  int64_t head_dim, heads, groups;
};

/// One way to compute attention.
struct Competitor {
  std::string name;
  Ranks ranks;  ///< {0, 0} if it is exact
  std::function<at::Tensor(const Inputs&)> run;

  bool is_lowrank() const { return ranks.qk > 0; }
  bool is_sdpa() const { return name.starts_with("sdpa"); }
};

std::vector<Shape> shapes() {
  const auto head_dims = parse_list("head_dims", FLAGS_head_dims, 1);
  auto heads = parse_list("heads", FLAGS_heads, 1),
       groups = parse_list("kv_groups", FLAGS_kv_groups, 1);
  for (auto* list : {&heads, &groups}) {
    if (list->size() == 1) {
      list->resize(head_dims.size(), list->front());
    }
    check(ErrorKind::kUsage, list->size() == head_dims.size(), "--head_dims=", FLAGS_head_dims,
          ", --heads=", FLAGS_heads, ", --kv_groups=", FLAGS_kv_groups,
          ": the lists must be equally long, or one number for all");
  }
  std::vector<Shape> result;
  for (size_t i = 0; i < head_dims.size(); ++i) {
    check(ErrorKind::kUsage, heads[i] % groups[i] == 0, heads[i], " heads cannot be dealt out to ",
          groups[i], " KV groups evenly");
    result.push_back({head_dims[i], heads[i], groups[i]});
  }
  return result;
}

/// The sequence of --model and --data if they are given, else random ones: of `length` tokens, one
/// for each shape.
std::vector<Inputs> make_inputs(int64_t length) {
  if (FLAGS_model.empty()) {
    std::vector<Inputs> result;
    for (const Shape& s : shapes()) {
      result.push_back(random_inputs(s.heads, s.groups, length, s.head_dim, FLAGS_seed));
    }
    return result;
  }
  return captured_inputs({FLAGS_layer}, 0, length);
}

/// drrl's exact attention, SDPA in one or two ways, low rank.
std::vector<Competitor> competitors(const Inputs& inputs, Geometry geometry) {
  const int64_t head_dim = inputs.head_dim();
  std::vector<Competitor> result = {
      {"drrl exact", {0, 0}, [](const Inputs& in) { return exact_attention(in.q, in.k, in.v); }},
      {"sdpa (copied keys)", {0, 0}, [](const Inputs& in) {
         return sdpa(in, /*causal=*/true, /*enable_gqa=*/false);
       }}};
  if (gqa_is_fused(inputs)) {
    result.push_back({"sdpa (enable_gqa)", {0, 0}, [](const Inputs& in) {
                        return sdpa(in, /*causal=*/true, /*enable_gqa=*/true);
                      }});
  }
  for (const Ranks& ranks : parse_ranks("ranks", FLAGS_ranks)) {
    if (ranks.qk <= head_dim && ranks.v <= head_dim) {
      result.push_back({"lowrank " + to_string(ranks), ranks,
                        [=](const Inputs& in) { return lowrank(in, ranks, geometry); }});
    }
  }
  check(ErrorKind::kUsage, result.back().is_lowrank(), "--ranks=", FLAGS_ranks,
        " holds no rank of at most ", head_dim, ", the head dim");
  return result;
}

/// All competitors on one shape: rows of flat results.
std::vector<Json> measure(const Inputs& in, Geometry geometry) {
  const at::Device device = in.q.device();
  const auto all = competitors(in, geometry);
  const auto grad = at::randn(in.q.sizes(), in.q.options());
  std::vector<Work> work;
  for (const Competitor& c : all) {
    work.emplace_back([&] { pass(c.run, in, {}); });
  }
  if (FLAGS_backward) {
    for (const Competitor& c : all) {
      work.emplace_back([&] { pass(c.run, in, grad); });
    }
  }
  const auto ms = interleaved_ms(work, FLAGS_repeats, device);
  const size_t n = all.size();
  const auto sdpa_ms = [&](size_t first) {  // whichever is faster
    double fastest = HUGE_VAL;
    for (size_t i = 0; i < n; ++i) {
      fastest = all[i].is_sdpa() ? std::min(fastest, median(ms[first + i])) : fastest;
    }
    return fastest;
  };

  at::Tensor exact;
  {
    at::NoGradGuard no_grad;
    exact = all[0].run(in);
  }
  std::vector<Json> rows;
  for (size_t i = 0; i < n; ++i) {
    const Competitor& c = all[i];
    double flops_fraction = 1;
    at::NoGradGuard no_grad;
    const at::Tensor out = c.is_lowrank() ? lowrank(in, c.ranks, geometry, &flops_fraction)
                                          : c.run(in);
    Json row = {{"seq_len", in.length()},
                {"head_dim", in.head_dim()},
                {"heads", in.heads()},
                {"kv_groups", in.groups()},
                {"competitor", c.name},
                {"rank_qk", c.is_lowrank() ? Json(c.ranks.qk) : Json()},
                {"rank_v", c.is_lowrank() ? Json(c.ranks.v) : Json()},
                {"forward_ms", median(ms[i])},
                {"forward_speedup", sdpa_ms(0) / median(ms[i])},
                {"forward_backward_ms", nullptr},
                {"forward_backward_speedup", nullptr},
                {"flops_fraction", flops_fraction},
                {"error", relative_error(out, exact)},
                {"peak_bytes", nullptr}};
    if (FLAGS_backward) {
      row["forward_backward_ms"] = median(ms[n + i]);
      row["forward_backward_speedup"] = sdpa_ms(n) / median(ms[n + i]);
    }
    rows.push_back(std::move(row));
  }
  for (size_t i = 0; i < n; ++i) {  // what is asked last disturbs no measurement
    const auto peak = peak_bytes(work[FLAGS_backward ? n + i : i], device);
    rows[i]["peak_bytes"] = peak ? Json(*peak) : Json();
    const bool split = FLAGS_parts && all[i].is_lowrank() &&
                       std::min(all[i].ranks.qk, all[i].ranks.v) < in.head_dim();
    const auto parts = split ? parts_ms(in, all[i].ranks, geometry, FLAGS_repeats)
                             : std::map<std::string, double>();
    for (const char* name : kParts) {
      rows[i][std::string(name) + "_ms"] = parts.contains(name) ? Json(parts.at(name)) : Json();
    }
  }
  return rows;
}

std::string shape_name(const Json& row) {
  return c10::str("d = ", row["head_dim"].get<int64_t>(), ", ", row["heads"].get<int64_t>(), "/",
                  row["kv_groups"].get<int64_t>());
}

std::string cell(const Json& value, const char* pattern, double factor = 1) {
  return value.is_null() ? "-" : format(pattern, value.get<double>() * factor);
}

void print_results(const Json& rows, bool real) {
  std::vector<std::vector<std::string>> table = {{"L", "d, heads/groups", "attention", "forward ms",
                                                  "speed", "fwd+bwd ms", "speed", "FLOPs", "error",
                                                  "peak MiB"}};
  for (const Json& row : rows) {
    table.push_back({cell(row["seq_len"], "%.0f"), shape_name(row), row["competitor"],
                     cell(row["forward_ms"], "%.2f"), cell(row["forward_speedup"], "%.2f"),
                     cell(row["forward_backward_ms"], "%.2f"),
                     cell(row["forward_backward_speedup"], "%.2f"),
                     cell(row["flops_fraction"], "%.3f"), cell(row["error"], "%.1e"),
                     cell(row["peak_bytes"], "%.1f", 1.0 / (1 << 20))});
  }
  std::cout << "\nspeed: times as fast as PyTorch's SDPA, the faster way; FLOPs: of exact "
               "attention, forward; peak: of "
            << (FLAGS_backward ? "forward + backward" : "forward")
            << (real ? "\n"
                     : "\nerror: of random inputs, whose spectra are flat: it says nothing about a "
                       "model\n");
  print_table(std::cout, table);
}

void print_parts(const Json& rows) {
  std::vector<std::vector<std::string>> table = {{"L", "d, heads/groups", "attention", "near",
                                                  "sinks", "far", "projections", "Grams", "bases",
                                                  "rest", "Grams + bases"}};
  for (const Json& row : rows) {
    if (row["near_ms"].is_null()) {
      continue;
    }
    double sum = 0;
    std::vector<std::string> line = {cell(row["seq_len"], "%.0f"), shape_name(row),
                                     row["competitor"]};
    for (const char* part : kParts) {
      const Json& ms = row[std::string(part) + "_ms"];
      sum += ms.get<double>();
      line.push_back(cell(ms, "%.2f"));
    }
    const double whole = row["forward_ms"].get<double>();
    line.push_back(format("%.2f", whole - sum));
    line.push_back(format(
        "%.1f %%", 100 * (row["grams_ms"].get<double>() + row["bases_ms"].get<double>()) / whole));
    table.push_back(std::move(line));
  }
  if (table.size() > 1) {
    std::cout << "\nwhere the forward's time goes [ms], each part measured on its own; rest: "
                 "merging and copies, less what\n"
                 "parts that run as one save\n";
    print_table(std::cout, table);
  }
}

/// Per shape and low-rank competitor the smallest length from which on it was faster than SDPA at
/// every measured length; null: not at the longest.
Json crossovers(const Json& rows) {
  std::map<std::string, Json> found;
  std::vector<std::string> order;
  for (const Json& row : rows) {  // by ascending length
    if (row["rank_qk"].is_null()) {
      continue;
    }
    const std::string key = shape_name(row) + ", " + row["competitor"].get<std::string>();
    if (found
            .try_emplace(
                key, Json{{"competitor", key}, {"forward", nullptr}, {"forward_backward", nullptr}})
            .second) {
      order.push_back(key);
    }
    for (const char* pass : {"forward", "forward_backward"}) {
      const Json& speed = row[std::string(pass) + "_speedup"];
      Json& length = found[key][pass];
      if (speed.is_null() || speed.get<double>() <= 1) {
        length = nullptr;
      } else if (length.is_null()) {
        length = row["seq_len"];
      }
    }
  }
  Json result = Json::array();
  for (const std::string& key : order) {
    result.push_back(found[key]);
  }
  return result;
}

void print_crossovers(const Json& crossovers) {
  std::vector<std::vector<std::string>> table = {
      {"faster than SDPA from L =", "forward", "forward + backward"}};
  for (const Json& c : crossovers) {
    table.push_back(
        {c["competitor"], cell(c["forward"], "%.0f"), cell(c["forward_backward"], "%.0f")});
  }
  std::cout << "\nthe smallest measured length from which on low rank is faster (-: not at the "
               "longest)\n";
  print_table(std::cout, table);
}

std::string plot(const Json& rows) {
  const char* speed = FLAGS_backward ? "forward_backward_speedup" : "forward_speedup";
  std::vector<PlotLine> lines;
  for (const Json& row : rows) {
    const std::string competitor = row["competitor"];
    if (competitor.starts_with("sdpa")) {
      continue;  // the dashed line
    }
    const std::string label = competitor +
                              ", d = " + std::to_string(row["head_dim"].get<int64_t>());
    auto line = std::find_if(lines.begin(), lines.end(),
                             [&](const PlotLine& l) { return l.label == label; });
    if (line == lines.end()) {
      line = lines.insert(line, {label, {}});
    }
    line->points.emplace_back(row["seq_len"].get<double>(), row[speed].get<double>());
  }
  return svg_plot(c10::str("Causal attention, ", FLAGS_backward ? "forward + backward" : "forward",
                           ", ", FLAGS_device, " ", FLAGS_dtype),
                  "sequence length L", "times as fast as PyTorch SDPA", lines);
}

}  // namespace

ExitCode attention(const Environment& environment) {
  auto lengths = parse_list("seq_lens", FLAGS_seq_lens, 1);
  std::sort(lengths.begin(), lengths.end());
  const at::Device device = device_flag(environment);
  const at::ScalarType dtype = dtype_flag("dtype", FLAGS_dtype);
  const Geometry geometry = geometry_flags();
  const bool real = !FLAGS_model.empty();

  std::vector<Inputs> longest = make_inputs(lengths.back());
  for (Inputs& in : longest) {
    competitors(in, geometry);  // refuses ranks before anything is measured
    in = with_start(std::move(in), geometry).to(device, dtype);
  }
  const std::string source = real
                                 ? c10::str("layer ", FLAGS_layer, " of ", FLAGS_model,
                                            " on the first tokens of ", FLAGS_data)
                                 : std::string(
                                       "random normal; their spectra are flat, so their errors say "
                                       "nothing about a model: give --model and --data for that");
  print_banner(std::cout, "drrl-bench attention",
               {{"inputs", source},
                {"threads", std::to_string(at::get_num_threads())},
                {"versions", version_line()}});

  Json rows = Json::array();
  for (const Inputs& in : longest) {
    for (const int64_t length : lengths) {
      std::cerr << "L = " << length << ", d = " << in.head_dim() << "\n";
      for (Json& row : measure(in.prefix(length), geometry)) {
        rows.push_back(std::move(row));
      }
    }
  }
  const Json crossover = crossovers(rows);
  print_results(rows, real);
  print_parts(rows);
  print_crossovers(crossover);

  if (!FLAGS_json.empty()) {
    Json json = provenance("attention");
    json["dtype"] = FLAGS_dtype;
    json["inputs"] = source;
    json["errors_are_meaningful"] = real;
    json["repeats"] = FLAGS_repeats;
    json["results"] = rows;
    json["crossover"] = crossover;
    write_text(FLAGS_json, json.dump(2) + "\n");
  }
  if (!FLAGS_csv.empty()) {
    write_text(FLAGS_csv, to_csv(rows));
  }
  if (!FLAGS_plot.empty()) {
    write_text(FLAGS_plot, plot(rows));
  }
  return ExitCode::kSuccess;
}

}  // namespace drrl::bench
