#include "launch/bench/bench.h"

#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/SDPBackend.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/autograd/autograd.h>

#include "core/attention/far_bases.h"
#include "core/error.h"
#include "core/linalg/gram.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/runtime/program.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/tokenizer.h"
#include "models/data/sequence_dataset.h"
#include "models/data/token_file.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/rank_policy.h"

namespace drrl::bench {
namespace {

/// Exact attention that keeps what some layers saw.
class CapturingController final : public AttentionController {
 public:
  explicit CapturingController(const std::vector<int64_t>& layers)
      : layers_(layers), captured_(layers.size()) {}

  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) override {
    for (size_t i = 0; i < layers_.size(); ++i) {
      if (layers_[i] == layer) {
        captured_[i] = {q.contiguous(), k.contiguous(), v.contiguous(), w_o};
      }
    }
    return exact_->attend(layer, q, k, v, w_o, plan);
  }
  std::vector<Inputs> take() { return std::move(captured_); }

 private:
  std::shared_ptr<AttentionController> exact_ = make_exact_attention();
  std::vector<int64_t> layers_;
  std::vector<Inputs> captured_;
};

class UniformPolicy final : public RankPolicy {
 public:
  explicit UniformPolicy(Ranks ranks) : ranks_(ranks) {}
  std::vector<Ranks> decide(const LayerObservation& o) override {
    return std::vector<Ranks>(static_cast<size_t>(o.items()), ranks_);
  }
  std::string describe() const override { return "uniform " + to_string(ranks_); }

 private:
  Ranks ranks_;
};

/// A line of /proc/self/status such as "VmHWM:   1234 kB", in bytes.
std::optional<int64_t> status_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    int64_t kibibytes = 0;
    if (word == key + ":" && status >> kibibytes) {
      return kibibytes * 1024;
    }
  }
  return std::nullopt;
}

}  // namespace

void pass(const std::function<at::Tensor(const Inputs&)>& attention, const Inputs& in,
          const at::Tensor& grad) {
  if (!grad.defined()) {
    at::NoGradGuard no_grad;
    attention(in);
    return;
  }
  const auto leaf = [](const at::Tensor& x) { return x.detach().requires_grad_(true); };
  const Inputs leaves{leaf(in.q), leaf(in.k), leaf(in.v), in.w_o, in.start};
  torch::autograd::grad({attention(leaves)}, {leaves.q, leaves.k, leaves.v}, {grad});
}

Inputs Inputs::prefix(int64_t length) const {
  const auto cut = [&](const at::Tensor& x) { return x.narrow(2, 0, length).contiguous(); };
  return {cut(q), cut(k), cut(v), w_o, start};
}

Inputs Inputs::to(at::Device device, at::ScalarType dtype) const {
  return {q.to(device, dtype), k.to(device, dtype), v.to(device, dtype), w_o.to(device),
          start.defined() ? start.to(device) : start};
}

Inputs random_inputs(int64_t heads, int64_t groups, int64_t length, int64_t head_dim,
                     uint64_t seed) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  const auto make = [&](at::IntArrayRef shape) { return at::randn(shape, generator, at::kFloat); };
  return {make({1, heads, length, head_dim}), make({1, groups, length, head_dim}),
          make({1, groups, length, head_dim}), make({heads * head_dim, heads * head_dim})};
}

std::vector<Inputs> captured_inputs(const std::vector<int64_t>& layers, int64_t start,
                                    int64_t length) {
  require("model", FLAGS_model);
  require("data", FLAGS_data);
  const ModelConfig config = read_model_config();
  check(ErrorKind::kUsage, length <= config.max_position_embeddings, "a sequence of ", length,
        " tokens is longer than the ", config.max_position_embeddings, " positions of ",
        FLAGS_model);
  for (const int64_t layer : layers) {
    check(ErrorKind::kUsage, layer < config.num_hidden_layers, "layer ", layer, ": ", FLAGS_model,
          " has ", config.num_hidden_layers, " layers");
  }
  const auto file = open_token_file(FLAGS_data, config, Environment::detect());
  check(ErrorKind::kData, start + length <= file->tokens(), file->bin_path().string(), " has ",
        file->tokens(), " tokens, tokens ", start, " to ", start + length, " are needed");
  const auto controller = std::make_shared<CapturingController>(layers);
  CausalLM model(config, Group(), controller);
  load_weights(model, Group());
  at::NoGradGuard no_grad;
  model.hidden(file->read(start, length).unsqueeze(0));
  return controller->take();
}

std::vector<Ranks> parse_ranks(const char* flag, const std::string& text) {
  std::vector<Ranks> ranks;
  for (const std::string& item : split(text, ',')) {
    const size_t slash = std::min(item.find('/'), item.size());
    const int64_t qk = parse_list(flag, item.substr(0, slash), 1).at(0);
    ranks.push_back(
        {qk, slash == item.size() ? qk : parse_list(flag, item.substr(slash + 1), 1).at(0)});
  }
  check(ErrorKind::kUsage, !ranks.empty(), "--", flag,
        " is empty: write ranks with commas between, as in 32,48/16");
  return ranks;
}

std::string to_string(const Ranks& ranks) {
  return ranks.qk == ranks.v ? std::to_string(ranks.qk)
                             : std::to_string(ranks.qk) + "/" + std::to_string(ranks.v);
}

Inputs with_start(Inputs in, Geometry geometry) {
  at::NoGradGuard no_grad;
  const int64_t rows = geometry.near_block;
  if (in.length() >= geometry.sink_tokens + rows && rows >= in.head_dim()) {
    in.start = first_pair_bases(block_grams(in.q, in.k, in.v, geometry.sink_tokens, 1, rows),
                                in.w_o)
                   .view({1, in.groups(), 2, in.head_dim(), in.head_dim()});
  }
  return in;
}

at::Tensor lowrank(const Inputs& in, Ranks ranks, Geometry geometry, double* flops_fraction,
                   double* basis_ms) {
  LowRankController controller(std::make_shared<UniformPolicy>(ranks), geometry,
                               {.update_steps = FLAGS_basis_updates, .start = in.start});
  controller.set_timing(basis_ms != nullptr);
  std::shared_ptr<LayerPlan> plan;
  const at::Tensor out = controller.attend(0, in.q, in.k, in.v, in.w_o, plan);
  const AttentionStatistics spent = controller.take_statistics();
  if (flops_fraction != nullptr) {
    *flops_fraction = spent.flops / spent.exact_flops;
  }
  if (basis_ms != nullptr) {
    *basis_ms = spent.basis_ms;
  }
  return out;
}

at::Tensor sdpa(const Inputs& in, bool causal, bool enable_gqa) {
  const int64_t copies = in.heads() / in.groups();
  const auto for_heads = [&](const at::Tensor& x) {
    return enable_gqa || copies == 1 ? x : x.repeat_interleave(copies, 1);
  };
  return at::scaled_dot_product_attention(in.q, for_heads(in.k), for_heads(in.v), /*attn_mask=*/{},
                                          /*dropout_p=*/0.0, causal,
                                          /*scale=*/std::nullopt, enable_gqa && copies > 1);
}

bool gqa_is_fused(const Inputs& in) {
  const int64_t kernel = at::_fused_sdp_choice(
      in.q, in.k, in.v, /*attn_mask=*/{}, /*dropout_p=*/0.0, /*is_causal=*/true,
      /*scale=*/std::nullopt, /*enable_gqa=*/in.heads() != in.groups());
  return kernel != static_cast<int64_t>(at::SDPBackend::math);
}

std::vector<std::vector<double>> interleaved_ms(const std::vector<Work>& work, int64_t rounds,
                                                at::Device device) {
  for (const Work& one : work) {
    one();
  }
  std::vector<std::vector<double>> ms(work.size());
  for (int64_t round = 0; round < rounds; ++round) {
    for (size_t turn = 0; turn < work.size(); ++turn) {
      const size_t i = (turn + static_cast<size_t>(round)) % work.size();
      synchronize(device);
      const auto start = std::chrono::steady_clock::now();
      work[i]();
      synchronize(device);
      ms[i].push_back(
          std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
              .count());
    }
  }
  return ms;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

std::optional<int64_t> peak_bytes(const Work& work, at::Device device) {
  if (device.is_cuda()) {
    const auto peak_of = [&](c10::DeviceAllocator* allocator, bool peak) {
      const auto stats = allocator->getDeviceStats(device.index()).allocated_bytes.at(0);
      return peak ? stats.peak : stats.current;
    };
    c10::DeviceAllocator* allocator = at::getDeviceAllocator(at::kCUDA);
    allocator->resetPeakStats(device.index());
    const int64_t before = peak_of(allocator, false);
    work();
    synchronize(device);
    return peak_of(allocator, true) - before;
  }
  malloc_trim(0);  // what was freed goes back to the system, so that resident means in use
  std::ofstream reset("/proc/self/clear_refs");
  if (!(reset << "5" << std::flush)) {  // VmHWM starts anew
    return std::nullopt;
  }
  const auto before = status_bytes("VmRSS");
  work();
  const auto peak = status_bytes("VmHWM");
  return before && peak ? std::optional(*peak - *before) : std::nullopt;
}

double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const auto exact = b.to(at::kDouble);
  return ((a.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
}

void check_exact(const std::string& what, const at::Tensor& result, const at::Tensor& expected) {
  const at::Tensor wrong = (result != expected).view({-1}).nonzero();
  if (wrong.numel() > 0) {
    const auto at = wrong[0].item<int64_t>();
    raise(ErrorKind::kCommunication, what, ": ", wrong.size(0), " of ", result.numel(),
          " elements are wrong, the first is element ", at, ": ",
          result.view({-1})[at].item<double>(), " instead of ",
          expected.view({-1})[at].item<double>());
  }
}

void print_table(std::ostream& out, const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(rows.at(0).size());
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      widths[i] = std::max(widths[i], row[i].size());
    }
  }
  for (size_t r = 0; r < rows.size(); ++r) {
    std::string line;
    for (size_t i = 0; i < rows[r].size(); ++i) {
      line += std::string(widths[i] - rows[r][i].size() + (i > 0 ? 2 : 0), ' ') + rows[r][i];
    }
    out << line << "\n";
    if (r == 0) {
      out << std::string(line.size(), '-') << "\n";
    }
  }
  out << std::flush;
}

std::string format(const char* pattern, double value) {
  char buffer[64];
  std::snprintf(buffer, sizeof(buffer), pattern, value);
  return buffer;
}

std::string to_csv(const nlohmann::ordered_json& rows) {
  std::string csv;
  const auto line = [&](const nlohmann::ordered_json& row, bool header) {
    std::string separator;
    for (const auto& [key, value] : row.items()) {
      csv += separator + (header              ? key
                          : value.is_null()   ? ""
                          : value.is_string() ? value.get<std::string>()
                                              : value.dump());
      separator = ",";
    }
    csv += "\n";
  };
  if (!rows.empty()) {
    line(rows[0], true);
  }
  for (const auto& row : rows) {
    line(row, false);
  }
  return csv;
}

nlohmann::ordered_json provenance(const char* benchmark) {
  char now[32];
  const std::time_t seconds = std::time(nullptr);
  std::strftime(now, sizeof(now), "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&seconds));
  nlohmann::ordered_json json = {
      {"benchmark", benchmark},          {"date", now},
      {"versions", version_line()},      {"device", FLAGS_device},
      {"cpu", at::get_cpu_capability()}, {"threads", at::get_num_threads()}};
  for (const Option& option : options()) {
    json["options"][option.name] = option.value;
  }
  return json;
}

}  // namespace drrl::bench
