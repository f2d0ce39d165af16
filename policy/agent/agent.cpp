#include "policy/agent/agent.h"

#include <array>
#include <cmath>

#include <ATen/CPUGeneratorImpl.h>

#include "core/error.h"
#include "distributed/collectives/agreement.h"
#include "policy/calibration/pair_features.h"
#include "policy/calibration/policy_file.h"

namespace drrl {
namespace {

// Parameters in this order: input, layer embedding, group embedding, then of each block.
enum Block { kNorm1, kQkv, kProjection, kNorm2, kUp, kDown, kBlockSize };
constexpr size_t kInput = 0, kLayerEmbedding = 1, kGroupEmbedding = 2, kFirstBlock = 3;
constexpr size_t kFinalNorm = kFirstBlock + RankAgent::kBlocks * kBlockSize, kHead = kFinalNorm + 1,
                 kCount = kHead + 1;

constexpr std::array<const char*, kCount> kNames = {
    "agent.input",          "agent.layers",       "agent.groups",
    "agent.blocks.0.norm1", "agent.blocks.0.qkv", "agent.blocks.0.projection",
    "agent.blocks.0.norm2", "agent.blocks.0.up",  "agent.blocks.0.down",
    "agent.blocks.1.norm1", "agent.blocks.1.qkv", "agent.blocks.1.projection",
    "agent.blocks.1.norm2", "agent.blocks.1.up",  "agent.blocks.1.down",
    "agent.norm",           "agent.head"};

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight) {
  return x * (x.pow(2).mean(-1, /*keepdim=*/true) + 1e-6).rsqrt() * weight;
}

}  // namespace

RankAgent::RankAgent(int64_t layers, int64_t groups, std::vector<int64_t> ranks, int64_t gates,
                     uint64_t seed)
    : layers_(layers),
      groups_(groups),
      gates_(gates),
      features_(pair_features(ranks)),
      ranks_(std::move(ranks)),
      mean_(at::zeros({layers, groups, features_})),
      deviation_(at::ones({layers, groups, features_})),
      strength_(at::ones({1}, at::kDouble)),
      budgets_(at::ones({1}, at::kDouble)),
      factors_(at::ones({1}, at::kDouble)),
      with_gates_(at::zeros({1}, at::kDouble)) {
  auto generator = at::detail::createCPUGenerator(seed);
  const auto matrix = [&](int64_t out, int64_t in) {
    return at::randn({out, in}, generator) / std::sqrt(static_cast<double>(in));
  };
  const auto ones = [] { return at::ones({kWidth}); };
  parameters_ = {matrix(kWidth, features_), 0.1 * at::randn({layers, kWidth}, generator),
                 0.1 * at::randn({groups, kWidth}, generator)};
  for (int64_t block = 0; block < kBlocks; ++block) {
    parameters_.insert(parameters_.end(),
                       {ones(), matrix(3 * kWidth, kWidth), 0.3 * matrix(kWidth, kWidth), ones(),
                        matrix(2 * kWidth, kWidth), 0.3 * matrix(kWidth, 2 * kWidth)});
  }
  parameters_.push_back(ones());
  parameters_.push_back(at::zeros({outputs(), kWidth}));
  for (at::Tensor& parameter : parameters_) {
    parameter.requires_grad_(true);
  }
}

RankAgent::Factors RankAgent::forward(const at::Tensor& state, const at::Tensor& group,
                                      int64_t first_layer, Memory* memory) const {
  const int64_t n = state.size(0), t = state.size(1);
  TORCH_CHECK(state.dim() == 3 && state.size(2) == features_ &&
                  group.sizes() == at::IntArrayRef({n}) && first_layer + t <= layers_ &&
                  (memory == nullptr || t == 1),
              "RankAgent: state ", state.sizes(), ", group ", group.sizes(), " at layer ",
              first_layer, " of ", layers_);
  const auto of_items = [&](const at::Tensor& table) {
    return table.narrow(0, first_layer, t).index_select(1, group).transpose(0, 1);
  };
  const auto& p = parameters_;
  auto x = at::linear((state - of_items(mean_)) / of_items(deviation_), p[kInput]) +
           p[kLayerEmbedding].narrow(0, first_layer, t) +
           p[kGroupEmbedding].index_select(0, group).unsqueeze(1);
  if (memory != nullptr && memory->empty()) {
    memory->resize(kBlocks);
  }
  for (int64_t b = 0; b < kBlocks; ++b) {
    const auto of = [&](Block which) -> const at::Tensor& {
      return p[kFirstBlock + static_cast<size_t>(b * kBlockSize + which)];
    };
    const auto qkv = at::linear(rms_norm(x, of(kNorm1)), of(kQkv))
                         .view({n, t, 3, kHeads, kWidth / kHeads})
                         .permute({2, 0, 3, 1, 4});
    auto keys = qkv[1], values = qkv[2];
    if (memory != nullptr) {
      auto& [old_keys, old_values] = (*memory)[static_cast<size_t>(b)];
      keys = old_keys = old_keys.defined() ? at::cat({old_keys, keys}, 2) : keys;
      values = old_values = old_values.defined() ? at::cat({old_values, values}, 2) : values;
    }
    auto scores = at::matmul(qkv[0], keys.transpose(2, 3)) /
                  std::sqrt(static_cast<double>(kWidth / kHeads));
    if (memory == nullptr) {
      scores = scores.masked_fill(at::ones({t, t}, at::kBool).triu(1), -INFINITY);
    }
    const auto
        mixed = at::matmul(at::softmax(scores, 3), values).transpose(1, 2).reshape({n, t, kWidth});
    x = x + at::linear(mixed, of(kProjection));
    x = x + at::linear(at::silu(at::linear(rms_norm(x, of(kNorm2)), of(kUp))), of(kDown));
  }
  const auto logs = (strength() * kLimit) *
                    at::tanh(at::linear(rms_norm(x, p[kFinalNorm]), p[kHead]) / kLimit);
  const auto ranks = static_cast<int64_t>(ranks_.size()), damages = 2 * ranks * (1 + gates_);
  return {logs.narrow(2, 0, damages).reshape({n, t, 2, ranks, 1 + gates_}),
          logs.narrow(2, damages, outputs() - damages).reshape({n, t, ranks + 1, gates_})};
}

void RankAgent::set_normalization(at::Tensor mean, at::Tensor deviation) {
  TORCH_CHECK(mean.sizes() == mean_.sizes() && deviation.sizes() == mean_.sizes(),
              "RankAgent: normalization ", mean.sizes(), " and ", deviation.sizes(), ", expected ",
              mean_.sizes());
  mean_ = std::move(mean);
  deviation_ = std::move(deviation);
}

void RankAgent::set_prices(std::vector<double> budgets, std::vector<double> factors) {
  TORCH_CHECK(!budgets.empty() && budgets.size() == factors.size() &&
                  std::is_sorted(budgets.begin(), budgets.end()),
              "RankAgent: ", budgets.size(), " budgets, ", factors.size(), " factors");
  budgets_ = at::tensor(budgets, at::kDouble);
  factors_ = at::tensor(factors, at::kDouble);
}

double RankAgent::price_factor(double budget) const {
  const auto* x = budgets_.const_data_ptr<double>();
  const auto* y = factors_.const_data_ptr<double>();
  const int64_t n = budgets_.numel();
  int64_t i = 0;
  while (i + 1 < n && x[i + 1] < budget) {
    ++i;
  }
  if (i + 1 == n || budget <= x[0]) {
    return budget <= x[0] ? y[0] : y[n - 1];
  }
  return y[i] + (y[i + 1] - y[i]) * (budget - x[i]) / (x[i + 1] - x[i]);
}

double RankAgent::flops() const {
  const auto w = static_cast<double>(kWidth);
  return 2 * w * static_cast<double>(features_ + outputs()) +
         kBlocks * (2 * w * w * 8 + 4 * w * static_cast<double>(layers_));
}

std::vector<NamedTensor> RankAgent::tensors() const {
  std::vector<NamedTensor> all;
  for (size_t i = 0; i < kCount; ++i) {
    all.push_back({kNames[i], parameters_[i].detach()});
  }
  all.insert(all.end(), {{"agent.mean", mean_},
                         {"agent.deviation", deviation_},
                         {"agent.strength", strength_},
                         {"agent.budgets", budgets_},
                         {"agent.price_factors", factors_},
                         {"agent.with_gates", with_gates_}});
  return all;
}

std::string RankAgent::digest() const {
  std::vector<uint64_t> hashes;
  for (const NamedTensor& t : tensors()) {
    const auto value = t.value.contiguous();
    hashes.push_back(hash_bytes(value.const_data_ptr(), value.nbytes()));
  }
  return to_hex(hash_bytes(hashes.data(), hashes.size() * sizeof(uint64_t)));
}

void RankAgent::save(const std::filesystem::path& file, const Calibration& calibration) const {
  auto all = calibration.tensors();
  const auto mine = tensors();
  all.insert(all.end(), mine.begin(), mine.end());
  write_safetensors(file, all, calibration.metadata(), [](const std::filesystem::path& written) {
    load(written, Calibration::load(written));
  });
}

RankAgent RankAgent::load(const std::filesystem::path& path, const Calibration& calibration) {
  const PolicyFile file(path, "policy", calibration.metadata().at("format").c_str());
  check(ErrorKind::kModel, file.contains(kNames[0]), path,
        " holds a calibration but no trained agent (drrl-policy train makes one)");
  RankAgent agent(calibration.layers(), calibration.groups(), calibration.ranks,
                  calibration.gate_count(), 0);
  const auto read = [&](const std::string& name, const at::Tensor& like) {
    auto tensor = file.tensor(name, like.scalar_type(), like.dim());
    check(ErrorKind::kModel, tensor.sizes() == like.sizes(), path, ": \"", name, "\" is ",
          tensor.sizes(), ", expected ", like.sizes());
    return tensor;
  };
  for (size_t i = 0; i < kCount; ++i) {
    agent.parameters_[i] = read(kNames[i], agent.parameters_[i]).requires_grad_(true);
  }
  agent.set_normalization(read("agent.mean", agent.mean_),
                          read("agent.deviation", agent.deviation_));
  check(ErrorKind::kModel, (agent.deviation_ > 0).all().item<bool>(), path,
        ": \"agent.deviation\" holds an entry that is not positive");
  agent.strength_ = read("agent.strength", agent.strength_);
  agent.with_gates_ = read("agent.with_gates", agent.with_gates_);
  const auto list = [&](const char* name) {
    const auto t = file.tensor(name, at::kDouble, 1);
    return std::vector<double>(t.const_data_ptr<double>(), t.const_data_ptr<double>() + t.numel());
  };
  const auto budgets = list("agent.budgets"), factors = list("agent.price_factors");
  check(ErrorKind::kModel,
        budgets.size() == factors.size() && std::is_sorted(budgets.begin(), budgets.end()) &&
            *std::min_element(factors.begin(), factors.end()) > 0,
        path, ": \"agent.budgets\" and \"agent.price_factors\" do not fit each other");
  agent.set_prices(budgets, factors);
  return agent;
}

}  // namespace drrl
