// drrl-bench peers: low-rank attention against other ways to compress it, on what the layers of a
// real model see of a real text: error and time, one run, same inputs. launch/bench/peers.py adds
// peers that exist as Python packages.

#include <algorithm>
#include <iostream>
#include <numeric>

#include <ATen/Parallel.h>
#include <gflags/gflags.h>

#include "core/attention/exact_attention.h"
#include "core/attention/flops.h"
#include "core/attention/lowrank_attention.h"
#include "core/error.h"
#include "core/io/file_io.h"
#include "core/io/safetensors.h"
#include "core/linalg/basis.h"
#include "core/linalg/eigensolver.h"
#include "core/linalg/gram.h"
#include "launch/bench/bench.h"
#include "launch/bench/flags.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/options/policy_flags.h"
#include "launch/runtime/console.h"
#include "launch/runtime/program.h"
#include "models/causal_lm/config.h"
#include "policy/attention/lowrank_controller.h"

DEFINE_string(
    layers, "all",
    "peers: layers of --model to take queries, keys and values from: all, or a comma list");
DEFINE_int64(static_tokens, 8192,
             "peers: text that the static bases are calibrated on, right after the sequence that "
             "is measured [tokens]");
DEFINE_string(dump, "", "peers: safetensors file for the queries, keys and values of every layer");

namespace drrl::bench {
namespace {

using Json = nlohmann::ordered_json;

/// A layer's inputs, and what static bases need to know of another text: bases of each KV group,
/// [G, d, d].
struct Layer {
  Inputs in;
  Basis static_scores, static_values;
};

/// A way to compute causal attention. `flops_fraction` <- operations over those of exact attention.
struct Method {
  std::string name;
  std::optional<Ranks> ranks;
  std::function<at::Tensor(const Layer&, double* flops_fraction)> run;
};

Basis for_pairs(const Basis& of_groups, int64_t pairs) {
  const auto repeat = [&](const at::Tensor& x) { return x.repeat_interleave(pairs, 0); };
  return {repeat(of_groups.left), repeat(of_groups.right), repeat(of_groups.singular_values)};
}

/// Our operator with bases from elsewhere; `decompositions` basis problems, and Grams if there were
/// any, count.
at::Tensor with_bases(const Inputs& in, Ranks ranks, const BlockTree& tree, Basis scores,
                      Basis values, int64_t decompositions, double* flops_fraction) {
  const auto plan = c10::make_intrusive<LowRankPlan>(
      tree, std::vector<Ranks>(static_cast<size_t>(in.groups() * tree.num_pairs()), ranks),
      std::move(scores), std::move(values));
  AttentionFlops flops = lowrank_attention_flops(*plan, 1, in.heads(), in.groups(), in.head_dim(),
                                                 0, /*with_backward=*/false);
  flops.bases = static_cast<double>(decompositions) * basis_solve_flops(in.head_dim());
  flops.grams = decompositions > 0 ? flops.grams : 0;
  *flops_fraction = flops.total() /
                    exact_attention_flops(1, in.heads(), in.length(), in.head_dim(), false);
  return lowrank_attention(in.q, in.k, in.v, plan);
}

/// Principal components of the keys of each far pair serve queries and keys, those of the values
/// the values: what is left of the method when queries and W_O are not looked at (keys alone: Loki,
/// arXiv 2406.02542; values: Eigen Attention, arXiv 2408.05646).
at::Tensor key_only_pca(const Inputs& in, Ranks ranks, Geometry geometry, double* flops_fraction) {
  const BlockTree tree(in.length(), geometry);
  const PairGrams grams = pair_grams(in.q, in.k, in.v, tree);
  const auto components = [](const at::Tensor& gram) {
    const auto [values, vectors] = batched_eigh(gram.flatten(0, 2));
    const auto descending = vectors.flip(2).to(at::kFloat).contiguous();
    return Basis{descending, descending, values.flip(1)};
  };
  // Two eigenproblems of 9 d^3 are about one basis problem (core/attention/flops.h).
  return with_bases(in, ranks, tree, components(grams.keys), components(grams.values),
                    in.groups() * tree.num_pairs(), flops_fraction);
}

/// Bases of the best approximation of another text, without its sinks.
void calibrate_static(Layer& layer, const Inputs& other, const Geometry& geometry) {
  const auto gram = [&](const at::Tensor& x) {  // [G, d, d]
    return token_gram(x.slice(2, geometry.sink_tokens), other.groups(),
                      x.size(2) - geometry.sink_tokens)[0];
  };
  layer.static_scores = solve_basis(gram(other.q), gram(other.k));
  layer.static_values = solve_basis(gram(other.v),
                                    output_gram(other.w_o, other.groups(), other.head_dim()));
}

std::vector<Method> methods(Geometry geometry) {
  const auto exact = [](auto run) {
    return [run](const Layer& layer, double* flops_fraction) {
      *flops_fraction = 1;
      return run(layer.in);
    };
  };
  std::vector<Method> result = {
      {"SDPA", std::nullopt,
       exact([](const Inputs& in) { return sdpa(in, /*causal=*/true, gqa_is_fused(in)); })},
      {"drrl exact", std::nullopt,
       exact([](const Inputs& in) { return exact_attention(in.q, in.k, in.v); })}};
  for (const Ranks& ranks : parse_ranks("ranks", FLAGS_ranks)) {
    result.push_back({"static bases", ranks, [=](const Layer& layer, double* flops_fraction) {
                        const BlockTree tree(layer.in.length(), geometry);
                        return with_bases(
                            layer.in, ranks, tree, for_pairs(layer.static_scores, tree.num_pairs()),
                            for_pairs(layer.static_values, tree.num_pairs()), 0, flops_fraction);
                      }});
    result.push_back({"key-only PCA", ranks, [=](const Layer& layer, double* flops_fraction) {
                        return key_only_pca(layer.in, ranks, geometry, flops_fraction);
                      }});
    result.push_back({"drrl", ranks, [=](const Layer& layer, double* flops_fraction) {
                        return lowrank(layer.in, ranks, geometry, flops_fraction);
                      }});
  }
  return result;
}

/// What the layer adds to the residual stream: out [1, H, L, d] through W_O -> [L, hidden].
at::Tensor layer_output(const at::Tensor& out, const Inputs& in) {
  return at::matmul(out[0].transpose(0, 1).flatten(1).to(at::kFloat),
                    in.w_o.transpose(0, 1).to(at::kFloat));
}

std::vector<int64_t> layer_list(const ModelConfig& config) {
  if (FLAGS_layers != "all") {
    return parse_list("layers", FLAGS_layers, 0);
  }
  std::vector<int64_t> layers(static_cast<size_t>(config.num_hidden_layers));
  std::iota(layers.begin(), layers.end(), 0);
  return layers;
}

// Errors: Error(kUsage) for options that do not fit the model or each other.
void check_options(const ModelConfig& config, const Geometry& geometry,
                   const std::vector<Method>& all) {
  check_seq_len(config);
  check(ErrorKind::kUsage, BlockTree(FLAGS_seq_len, geometry).num_pairs() > 0,
        "--seq_len=", FLAGS_seq_len, " has no far tokens at --near_block=", geometry.near_block);
  check(ErrorKind::kUsage,
        FLAGS_static_tokens > geometry.sink_tokens &&
            FLAGS_static_tokens <= config.max_position_embeddings,
        "--static_tokens=", FLAGS_static_tokens, " must be more than --sink_tokens and at most ",
        config.max_position_embeddings, ", the positions of ", FLAGS_model);
  for (const Method& method : all) {
    check(ErrorKind::kUsage,
          !method.ranks || std::max(method.ranks->qk, method.ranks->v) < config.head_dim,
          "--ranks=", FLAGS_ranks, ": peers are compared below the head dim of ", config.head_dim);
  }
}

// --dump: the layers' inputs.
void dump(const std::vector<Layer>& layers, const std::vector<int64_t>& indices) {
  std::vector<NamedTensor> tensors;
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string prefix = "layers." + std::to_string(indices[i]) + ".";
    const Inputs& in = layers[i].in;
    tensors.insert(tensors.end(), {{prefix + "q", in.q},
                                   {prefix + "k", in.k},
                                   {prefix + "v", in.v},
                                   {prefix + "w_o", in.w_o}});
  }
  write_safetensors(FLAGS_dump, tensors);
}

// The layers' inputs on the first tokens of the data, with static bases from those after them.
std::vector<Layer> read_layers(const std::vector<int64_t>& indices, const Geometry& geometry,
                               const at::Device& device, at::ScalarType dtype) {
  std::vector<Layer> layers;
  for (Inputs& in : captured_inputs(indices, 0, FLAGS_seq_len)) {
    layers.push_back({std::move(in), {}, {}});
  }
  if (!FLAGS_dump.empty()) {
    dump(layers, indices);
  }
  const auto others = captured_inputs(indices, FLAGS_seq_len, FLAGS_static_tokens);
  for (size_t i = 0; i < layers.size(); ++i) {
    calibrate_static(layers[i], others[i], geometry);
    for (Basis* basis : {&layers[i].static_scores, &layers[i].static_values}) {
      *basis = {basis->left.to(device), basis->right.to(device), basis->singular_values.to(device)};
    }
    layers[i].in = layers[i].in.to(device, dtype);
  }
  return layers;
}

// What a method makes of the layers.
struct Quality {
  double flops_fraction = 0;
  double mean = 0, worst = 0;  // relative errors of the layers' attention
  double after_w_o = 0;        // mean relative error of the layers' outputs
};

Quality quality_of(const Method& method, const std::vector<Layer>& layers) {
  Quality quality;
  for (const Layer& layer : layers) {
    const at::Tensor out = method.run(layer, &quality.flops_fraction),
                     exact = exact_attention(layer.in.q, layer.in.k, layer.in.v);
    const double error = relative_error(out, exact);
    quality.mean += error / static_cast<double>(layers.size());
    quality.worst = std::max(quality.worst, error);
    quality.after_w_o += relative_error(layer_output(out, layer.in),
                                        layer_output(exact, layer.in)) /
                         static_cast<double>(layers.size());
  }
  return quality;
}

}  // namespace

ExitCode peers(const Environment& environment) {
  require("model", FLAGS_model);
  require("data", FLAGS_data);
  const at::Device device = device_flag(environment);
  const at::ScalarType dtype = dtype_flag("dtype", FLAGS_dtype);
  const Geometry geometry = geometry_flags();
  const ModelConfig config = read_config();
  const auto all = methods(geometry);
  check_options(config, geometry, all);
  const std::vector<int64_t> indices = layer_list(config);
  const std::string source = c10::str(indices.size(), " layers of ", FLAGS_model, " on the first ",
                                      FLAGS_seq_len, " tokens of ", FLAGS_data);
  print_banner(std::cout, "drrl-bench peers",
               {{"inputs", source},
                {"threads", std::to_string(at::get_num_threads())},
                {"versions", version_line()}});

  at::NoGradGuard no_grad;
  const std::vector<Layer> layers = read_layers(indices, geometry, device, dtype);
  std::vector<Work> work;
  double ignored = 0;
  for (const Method& method : all) {
    work.emplace_back([&] {
      for (const Layer& layer : layers) {
        method.run(layer, &ignored);
      }
    });
  }
  const auto ms = interleaved_ms(work, FLAGS_repeats, device);

  Json rows = Json::array();
  std::vector<std::vector<std::string>> table = {
      {"attention", "rank", "FLOPs", "error", "worst layer", "after W_O", "ms", "speed"}};
  for (size_t m = 0; m < all.size(); ++m) {
    const Quality quality = quality_of(all[m], layers);
    const std::string rank = all[m].ranks ? to_string(*all[m].ranks) : "-";
    const double speed = median(ms[0]) / median(ms[m]);
    rows.push_back({{"method", all[m].name},
                    {"causal", true},
                    {"size", all[m].ranks ? Json(rank) : Json()},
                    {"flops_fraction", quality.flops_fraction},
                    {"error", quality.mean},
                    {"worst_error", quality.worst},
                    {"layer_error", quality.after_w_o},
                    {"ms", median(ms[m])},
                    {"speedup", speed}});
    table.push_back({all[m].name, rank, format("%.3f", quality.flops_fraction),
                     format("%.2e", quality.mean), format("%.2e", quality.worst),
                     format("%.2e", quality.after_w_o), format("%.1f", median(ms[m])),
                     format("%.2f", speed)});
  }
  std::cout << "\nforward, " << source
            << "\nerror: ||O' - O||_F / ||O||_F against exact attention, mean over the layers; "
               "after W_O: the same of the layers' outputs\n"
               "ms: of all layers\n";
  print_table(std::cout, table);
  if (!FLAGS_json.empty()) {
    Json json = provenance("peers");
    json["dtype"] = FLAGS_dtype;
    json["inputs"] = source;
    json["seq_len"] = FLAGS_seq_len;
    json["layers"] = indices;
    json["repeats"] = FLAGS_repeats;
    json["results"] = rows;
    write_text(FLAGS_json, json.dump(2) + "\n");
  }
  return ExitCode::kSuccess;
}

}  // namespace drrl::bench
