#include "policy/rank_policy.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <sstream>

#include "core/error.h"
#include "policy/calibration.h"

namespace drrl {
namespace {

int64_t items(const LayerObservation& o) { return o.batch * o.groups * o.tree.num_pairs(); }

class FullPolicy final : public RankPolicy {
 public:
  std::vector<Ranks> decide(const LayerObservation& o) override {
    return std::vector<Ranks>(items(o), Ranks{o.head_dim, o.head_dim});
  }
  bool exact() const override { return true; }
  std::string describe() const override { return "full"; }
};

class FixedPolicy final : public RankPolicy {
 public:
  explicit FixedPolicy(int64_t rank) : rank_(rank) {}
  std::vector<Ranks> decide(const LayerObservation& o) override { return std::vector<Ranks>(items(o), Ranks{rank_, rank_}); }
  std::string describe() const override { return c10::str("fixed, rank ", rank_); }

 private:
  int64_t rank_;
};

class EnergyPolicy final : public RankPolicy {
 public:
  EnergyPolicy(double energy, std::vector<int64_t> buckets) : energy_(energy), buckets_(std::move(buckets)) {}

  std::vector<Ranks> decide(const LayerObservation& o) override {
    const auto score_loss = o.score_loss.to(at::kCPU).contiguous();
    const auto value_loss = o.value_loss.to(at::kCPU).contiguous();
    const auto smallest = [&](const at::Tensor& loss, int64_t item) {
      const double* row = loss.const_data_ptr<double>() + item * (o.head_dim + 1);
      for (const int64_t rank : buckets_) {
        if (row[rank] <= 1 - energy_) {
          return rank;
        }
      }
      return o.head_dim;
    };
    std::vector<Ranks> ranks;
    for (int64_t i = 0; i < items(o); ++i) {
      ranks.push_back({smallest(score_loss, i), smallest(value_loss, i)});
    }
    return ranks;
  }
  bool needs_spectra() const override { return true; }
  std::string describe() const override { return c10::str("energy, keeping ", energy_); }

 private:
  double energy_;
  std::vector<int64_t> buckets_;
};

class AllocatedPolicy final : public RankPolicy {
 public:
  AllocatedPolicy(std::vector<Ranks> layers, double budget) : layers_(std::move(layers)), budget_(budget) {}

  std::vector<Ranks> decide(const LayerObservation& o) override {
    return std::vector<Ranks>(items(o), layers_.at(static_cast<size_t>(o.layer)));
  }
  std::string describe() const override {
    std::ostringstream line;
    line << "dp, budget " << budget_ << ", ranks (scores/values) per layer";
    for (const Ranks& ranks : layers_) {
      line << " " << ranks.qk << "/" << ranks.v;
    }
    return line.str();
  }

 private:
  std::vector<Ranks> layers_;
  double budget_;
};

}  // namespace

std::vector<int64_t> rank_buckets(const at::Device& device, int64_t head_dim) {
  const int64_t step = head_dim < 64 ? std::max<int64_t>(1, head_dim / 4) : (device.is_cuda() ? 32 : 16);
  std::vector<int64_t> buckets;
  for (int64_t rank = step; rank < head_dim; rank += step) {
    buckets.push_back(rank);
  }
  buckets.push_back(head_dim);
  return buckets;
}

std::unique_ptr<RankPolicy> make_full_policy() { return std::make_unique<FullPolicy>(); }

std::unique_ptr<RankPolicy> make_fixed_policy(int64_t rank, int64_t head_dim) {
  check(ErrorKind::kUsage, rank >= 1 && rank <= head_dim, "rank ", rank, ", expected 1 to the model's head_dim ", head_dim);
  return std::make_unique<FixedPolicy>(rank);
}

std::unique_ptr<RankPolicy> make_energy_policy(double energy, std::vector<int64_t> buckets) {
  check(ErrorKind::kUsage, energy > 0 && energy <= 1, "energy to keep is ", energy, ", expected more than 0 and at most 1");
  return std::make_unique<EnergyPolicy>(energy, std::move(buckets));
}

std::unique_ptr<RankPolicy> make_dp_policy(const Calibration& calibration, double budget, int64_t layers, int64_t head_dim,
                                           const std::vector<int64_t>& buckets) {
  return std::make_unique<AllocatedPolicy>(allocate(calibration, budget, layers, head_dim, buckets), budget);
}

}  // namespace drrl
