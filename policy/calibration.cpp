#include "policy/calibration.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/storage.h"
#include "core/attention_part.h"
#include "policy/controller.h"

namespace drrl {
namespace {

constexpr const char* kFormat = "drrl-calibration-1";

std::vector<std::vector<double>> damage_table(const nlohmann::json& json, const char* field, size_t ranks, const std::string& file) {
  const auto& rows = json.at(field);
  std::vector<std::vector<double>> table;
  for (const auto& row : rows) {
    table.push_back(row.get<std::vector<double>>());
    check(ErrorKind::kModel, table.back().size() == ranks, file, ": \"", field, "\" of layer ", table.size() - 1, " has ",
          table.back().size(), " entries, expected one per rank: ", ranks);
    for (const double value : table.back()) {
      check(ErrorKind::kModel, std::isfinite(value) && value >= 0, file, ": \"", field, "\" of layer ", table.size() - 1, " holds ",
            value, ", expected finite and not negative");
    }
  }
  return table;
}

}  // namespace

void Calibration::save(const std::filesystem::path& file) const {
  const nlohmann::json json = {{"format", kFormat},
                               {"model", model},
                               {"data", data},
                               {"seq_len", seq_len},
                               {"tokens", tokens},
                               {"head_dim", head_dim},
                               {"near_block", geometry.near_block},
                               {"sink_tokens", geometry.sink_tokens},
                               {"ranks", ranks},
                               {"score_damage", score_damage},
                               {"value_damage", value_damage}};
  write_text(file, json.dump(1) + "\n");
}

Calibration Calibration::load(const std::filesystem::path& file) {
  std::ifstream in(file);
  check(ErrorKind::kModel, in.good(), "no calibration file ", file.string(), " (drrl-policy calibrate makes one)");
  try {
    const auto json = nlohmann::json::parse(in);
    const auto format = json.at("format").get<std::string>();
    check(ErrorKind::kModel, format == kFormat, file.string(), ": \"format\" is \"", format, "\", expected \"", kFormat, "\"");
    Calibration c;
    c.model = json.at("model").get<std::string>();
    c.data = json.at("data").get<std::string>();
    c.seq_len = json.at("seq_len").get<int64_t>();
    c.tokens = json.at("tokens").get<int64_t>();
    c.head_dim = json.at("head_dim").get<int64_t>();
    c.geometry = {json.at("near_block").get<int64_t>(), json.at("sink_tokens").get<int64_t>()};
    c.ranks = json.at("ranks").get<std::vector<int64_t>>();
    check(ErrorKind::kModel,
          !c.ranks.empty() && std::is_sorted(c.ranks.begin(), c.ranks.end(), std::less_equal<>()) && c.ranks.front() >= 1 &&
              c.ranks.back() < c.head_dim,
          file.string(), ": \"ranks\" must rise within 1 to head_dim - 1 = ", c.head_dim - 1);
    c.score_damage = damage_table(json, "score_damage", c.ranks.size(), file.string());
    c.value_damage = damage_table(json, "value_damage", c.ranks.size(), file.string());
    check(ErrorKind::kModel, !c.score_damage.empty() && c.score_damage.size() == c.value_damage.size(), file.string(), ": ",
          c.score_damage.size(), " layers of score_damage, ", c.value_damage.size(), " of value_damage");
    return c;
  } catch (const nlohmann::json::exception& error) {
    raise(ErrorKind::kModel, file.string(), ": not a calibration file: ", error.what());
  }
}

std::vector<Ranks> allocate(const Calibration& calibration, double budget, int64_t layers, int64_t head_dim,
                            const std::vector<int64_t>& buckets) {
  check(ErrorKind::kUsage, budget > 0 && budget <= 1, "rank budget ", budget, ", expected more than 0 and at most 1");
  check(ErrorKind::kUsage, calibration.layers() == layers && calibration.head_dim == head_dim, "the calibration is of a model with ",
        calibration.layers(), " layers of head_dim ", calibration.head_dim, " (", calibration.model, "), this one has ", layers, " of ",
        head_dim);
  // Choices of one (layer, kind): rank and index into the damages, -1 for exact.
  std::vector<std::pair<int64_t, int>> choices;
  for (size_t i = 0; i < calibration.ranks.size(); ++i) {
    if (std::find(buckets.begin(), buckets.end(), calibration.ranks[i]) != buckets.end()) {
      choices.emplace_back(calibration.ranks[i], static_cast<int>(i));
    }
  }
  choices.emplace_back(head_dim, -1);

  // Knapsack over the 2 layers kinds. Ranks are measured in their greatest common divisor.
  int64_t unit = head_dim;
  for (const auto& [rank, index] : choices) {
    unit = std::gcd(unit, rank);
  }
  const int64_t kinds = 2 * layers;
  const int64_t capacity = static_cast<int64_t>(std::floor(budget * static_cast<double>(kinds * head_dim / unit) + 1e-9));
  check(ErrorKind::kUsage, capacity >= kinds * choices.front().first / unit, "rank budget ", budget,
        " is below the smallest calibrated rank everywhere: ", static_cast<double>(choices.front().first) / static_cast<double>(head_dim));
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  const auto damage_of = [&](int64_t kind, int index) {
    const auto& table = kind % 2 == 0 ? calibration.score_damage : calibration.value_damage;
    return index < 0 ? 0.0 : table[static_cast<size_t>(kind / 2)][static_cast<size_t>(index)];
  };
  std::vector<double> best(static_cast<size_t>(capacity + 1), 0.0);
  std::vector<std::vector<size_t>> chosen(static_cast<size_t>(kinds), std::vector<size_t>(static_cast<size_t>(capacity + 1), 0));
  for (int64_t kind = 0; kind < kinds; ++kind) {
    std::vector<double> next(best.size(), kInfinite);
    for (int64_t used = 0; used <= capacity; ++used) {
      for (size_t c = 0; c < choices.size(); ++c) {
        const int64_t cost = choices[c].first / unit;
        const double damage = cost > used ? kInfinite : best[static_cast<size_t>(used - cost)] + damage_of(kind, choices[c].second);
        if (damage < next[static_cast<size_t>(used)]) {
          next[static_cast<size_t>(used)] = damage;
          chosen[static_cast<size_t>(kind)][static_cast<size_t>(used)] = c;
        }
      }
    }
    best = std::move(next);
  }
  std::vector<Ranks> result(static_cast<size_t>(layers));
  int64_t left = capacity;
  for (int64_t kind = kinds - 1; kind >= 0; --kind) {
    const int64_t rank = choices[chosen[static_cast<size_t>(kind)][static_cast<size_t>(left)]].first;
    (kind % 2 == 0 ? result[static_cast<size_t>(kind / 2)].qk : result[static_cast<size_t>(kind / 2)].v) = rank;
    left -= rank / unit;
  }
  return result;
}

CalibrationController::CalibrationController(int64_t layers, Geometry geometry, std::vector<int64_t> ranks)
    : geometry_(geometry), ranks_(std::move(ranks)),
      damage_(at::zeros({layers, 2, static_cast<int64_t>(ranks_.size())}, at::kDouble)) {}

at::Tensor CalibrationController::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                         const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) {
  plan = std::make_shared<LayerPlan>();
  const auto out = exact_attention(q, k, v);
  if (out.requires_grad()) {
    out.register_hook([this, layer, q = q.detach(), k = k.detach(), v = v.detach(), w_o, exact = out.detach()](const at::Tensor& grad) {
      measure(layer, q, k, v, w_o, exact, grad);
    });
  }
  return out;
}

void CalibrationController::measure(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                                    const at::Tensor& exact, const at::Tensor& grad) {
  at::NoGradGuard no_grad;
  const BlockTree tree(q.size(2), geometry_);
  if (tree.num_pairs() == 0) {
    return;
  }
  const FarBases bases = solve_far_bases(q, k, v, w_o, tree, /*scores=*/true, /*values=*/true);
  const int64_t items = q.size(0) * k.size(1) * tree.num_pairs();
  const int64_t d = q.size(3);
  for (int64_t kind = 0; kind < 2; ++kind) {
    for (size_t i = 0; i < ranks_.size(); ++i) {
      const Ranks ranks = kind == 0 ? Ranks{ranks_[i], d} : Ranks{d, ranks_[i]};
      const auto plan = c10::make_intrusive<LowRankPlan>(tree, std::vector<Ranks>(static_cast<size_t>(items), ranks), bases.scores, bases.values);
      const auto error = lowrank_attention(q, k, v, plan) - exact;
      // [B, H, L, d] -> one number a token: how far this error moves the log-likelihood there
      const auto moved = (error * grad).sum({1, 3}, /*keepdim=*/false, at::kDouble);
      damage_[layer][kind][static_cast<int64_t>(i)] += 0.5 * moved.pow(2).sum().to(at::kCPU);
    }
  }
}

}  // namespace drrl
