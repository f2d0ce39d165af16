#include "policy/rank_policy.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <utility>

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

// The table's ranks for every pair that is observed.
std::vector<Ranks> look_up(const RankTable& table, const LayerObservation& o) {
  TORCH_CHECK(o.layer < table.layers() && o.first_group + o.groups <= table.groups() && o.tree.num_levels() <= table.levels(), "a rank table of ",
              table.layers(), " layers, ", table.groups(), " groups and ", table.levels(), " levels for layer ", o.layer, ", groups ", o.first_group,
              " to ", o.first_group + o.groups - 1, " and ", o.tree.num_levels(), " levels");
  std::vector<Ranks> ranks(static_cast<size_t>(items(o)));
  for (int64_t sequence = 0; sequence < o.batch * o.groups; ++sequence) {
    for (const PairRun& run : o.tree.runs()) {
      std::fill_n(ranks.begin() + sequence * o.tree.num_pairs() + run.first_pair, run.count,
                  table.at(o.layer, o.first_group + sequence % o.groups, run.level));
    }
  }
  return ranks;
}

class TablePolicy final : public RankPolicy {
 public:
  TablePolicy(RankTable table, std::string description) : table_(std::move(table)), description_(std::move(description)) {}
  std::vector<Ranks> decide(const LayerObservation& o) override { return look_up(table_, o); }
  std::string describe() const override { return description_; }

 private:
  RankTable table_;
  std::string description_;
};

class AllocatedPolicy final : public RankPolicy {
 public:
  AllocatedPolicy(Calibration calibration, double budget, std::vector<int64_t> buckets, int64_t update_steps)
      : calibration_(std::move(calibration)), budget_(budget), buckets_(std::move(buckets)), update_steps_(update_steps) {}

  std::vector<Ranks> decide(const LayerObservation& o) override {
    check(ErrorKind::kUsage, o.layer < calibration_.layers() && o.first_group + o.groups <= calibration_.groups() && o.head_dim == calibration_.head_dim(),
          "the calibration is of a model with ", calibration_.layers(), " layers, ", calibration_.groups(), " KV groups and head_dim ",
          calibration_.head_dim(), " (", calibration_.model, "), this one has layer ", o.layer, ", group ", o.first_group + o.groups - 1,
          " and head_dim ", o.head_dim);
    const int64_t heads_per_group = o.heads / o.groups;
    const auto key = std::pair(o.tree.sequence_length(), heads_per_group);
    auto found = tables_.find(key);
    if (found == tables_.end()) {
      found = tables_.emplace(key, allocate(calibration_, budget_, o.tree, heads_per_group, buckets_, update_steps_)).first;
    }
    return look_up(found->second, o);
  }

  std::string describe() const override {
    return c10::str("dp, budget ", budget_, ", calibrated on ", calibration_.tokens, " tokens of ", calibration_.data, " (", calibration_.digest(), ")");
  }

 private:
  Calibration calibration_;
  double budget_;
  std::vector<int64_t> buckets_;
  int64_t update_steps_;
  std::map<std::pair<int64_t, int64_t>, RankTable> tables_;
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

std::unique_ptr<RankPolicy> make_table_policy(RankTable table, std::string description) {
  return std::make_unique<TablePolicy>(std::move(table), std::move(description));
}

std::unique_ptr<RankPolicy> make_dp_policy(Calibration calibration, double budget, std::vector<int64_t> buckets, int64_t update_steps) {
  check(ErrorKind::kUsage, budget > 0 && budget <= 1, "rank budget ", budget, ", expected more than 0 and at most 1");
  return std::make_unique<AllocatedPolicy>(std::move(calibration), budget, std::move(buckets), update_steps);
}

}  // namespace drrl
