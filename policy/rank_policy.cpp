#include "policy/rank_policy.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include <c10/util/Exception.h>

#include "core/error.h"
#include "policy/agent/agent.h"
#include "policy/allocation/allocation.h"
#include "policy/allocation/candidates.h"
#include "policy/allocation/latency_table.h"
#include "policy/calibration/calibration.h"

namespace drrl {
namespace {

class ExactPolicy final : public RankPolicy {
 public:
  std::vector<Ranks> decide(const LayerObservation& o) override {
    return std::vector<Ranks>(static_cast<size_t>(o.items()), Ranks{o.head_dim, o.head_dim});
  }
  bool exact() const override { return true; }
  std::string describe() const override { return "exact"; }
};

class FixedPolicy final : public RankPolicy {
 public:
  explicit FixedPolicy(int64_t rank) : rank_(rank) {}
  std::vector<Ranks> decide(const LayerObservation& o) override {
    return std::vector<Ranks>(static_cast<size_t>(o.items()), Ranks{rank_, rank_});
  }
  std::string describe() const override { return c10::str("fixed, rank ", rank_); }

 private:
  int64_t rank_;
};

class EnergyPolicy final : public RankPolicy {
 public:
  EnergyPolicy(double energy, std::vector<int64_t> buckets)
      : energy_(energy), buckets_(std::move(buckets)) {}

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
    for (int64_t i = 0; i < o.items(); ++i) {
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
  TORCH_CHECK(o.layer < table.layers() && o.first_group + o.groups <= table.groups() &&
                  o.tree.num_levels() <= table.levels(),
              "a rank table of ", table.layers(), " layers, ", table.groups(), " groups and ",
              table.levels(), " levels for layer ", o.layer, ", groups ", o.first_group, " to ",
              o.first_group + o.groups - 1, " and ", o.tree.num_levels(), " levels");
  std::vector<Ranks> ranks(static_cast<size_t>(o.items()));
  size_t next = 0;
  for (int64_t sequence = 0; sequence < o.batch * o.groups; ++sequence) {
    for (int64_t pair = o.first_pair; pair < o.first_pair + o.pair_count(); ++pair) {
      ranks[next++] = table.at(o.layer, o.first_group + sequence % o.groups,
                               o.tree.run_of(pair).level);
    }
  }
  return ranks;
}

class TablePolicy final : public RankPolicy {
 public:
  TablePolicy(RankTable table, std::string description)
      : table_(std::move(table)), description_(std::move(description)) {}
  std::vector<Ranks> decide(const LayerObservation& o) override { return look_up(table_, o); }
  std::string describe() const override { return description_; }

 private:
  RankTable table_;
  std::string description_;
};

class DroppingPolicy final : public RankPolicy {
 public:
  DroppingPolicy(std::unique_ptr<RankPolicy> policy, double drop)
      : policy_(std::move(policy)), drop_(drop) {
    check(ErrorKind::kUsage, drop > 0 && drop < 1, "tiles are dropped below ", drop,
          " of a row's softmax, expected more than 0 and less than 1");
  }
  std::vector<Ranks> decide(const LayerObservation& o) override {
    std::vector<Ranks> ranks = policy_->decide(o);
    for (Ranks& r : ranks) {
      r.drop = static_cast<float>(drop_);
    }
    return ranks;
  }
  bool needs_spectra() const override { return policy_->needs_spectra(); }
  std::vector<int64_t> state_ranks() const override { return policy_->state_ranks(); }
  double flops_per_pair() const override { return policy_->flops_per_pair(); }
  void set_calibration(const Calibration& calibration) override {
    policy_->set_calibration(calibration);
  }
  std::optional<double> latency_fraction() const override { return policy_->latency_fraction(); }
  std::string describe() const override {
    return c10::str(policy_->describe(), ", tiles dropped below ", drop_);
  }

 private:
  std::unique_ptr<RankPolicy> policy_;
  double drop_;
};

void check_fits(const Calibration& c, const LayerObservation& o) {
  check(
      ErrorKind::kUsage,
      o.layer < c.layers() && o.first_group + o.groups <= c.groups() && o.head_dim == c.head_dim(),
      "the calibration is of a model with ", c.layers(), " layers, ", c.groups(),
      " KV groups and head_dim ", c.head_dim(), " (", c.model, "), this one has layer ", o.layer,
      ", group ", o.first_group + o.groups - 1, " and head_dim ", o.head_dim);
}

class AllocatedPolicy final : public RankPolicy {
 public:
  /// request: its heads per group and latency table are filled in here.
  AllocatedPolicy(Calibration calibration, AllocationRequest request,
                  std::shared_ptr<const LatencyTable> latency)
      : calibration_(std::move(calibration)),
        request_(std::move(request)),
        latency_(std::move(latency)),
        digest_(calibration_.digest()) {
    request_.latency = latency_.get();
    check(ErrorKind::kUsage, request_.budget > 0 && request_.budget <= 1, "rank budget ",
          request_.budget, ", expected more than 0 and at most 1");
  }

  std::vector<Ranks> decide(const LayerObservation& o) override {
    check_fits(calibration_, o);
    request_.heads_per_group = o.heads / o.groups;
    const auto key = std::pair(o.tree.sequence_length(), request_.heads_per_group);
    auto found = tables_.find(key);
    if (found == tables_.end()) {
      found = tables_.emplace(key, allocate(calibration_, o.tree, request_)).first;
    }
    cost_ = found->second.cost;
    return look_up(found->second.table, o);
  }

  void set_calibration(const Calibration& calibration) override {
    calibration_ = calibration;
    digest_ = calibration_.digest();
    tables_.clear();
  }

  std::optional<double> latency_fraction() const override {
    return latency_ && cost_ > 0 ? std::optional(cost_) : std::nullopt;
  }

  std::string describe() const override {
    const std::string name = request_.method == AllocationMethod::kOptimal ? "dp"
                             : request_.method == AllocationMethod::kGreedy
                                 ? "greedy"
                                 : c10::str("random ", request_.seed);
    return c10::str(name, request_.with_gates ? " with gates" : "", ", budget ", request_.budget,
                    latency_ ? " of the " + latency_->describe() : "", ", calibrated on ",
                    calibration_.tokens, " tokens of ", calibration_.data, " (", digest_, ")");
  }

 private:
  Calibration calibration_;
  AllocationRequest request_;
  std::shared_ptr<const LatencyTable> latency_;
  std::string digest_;  // of the calibration, for describe(), which is called in every pass
  std::map<std::pair<int64_t, int64_t>, Allocation> tables_;
  double cost_ = 0;  // of the ranks decided last, as a share of exact attention's
};

class LearnedPolicy final : public RankPolicy {
 public:
  LearnedPolicy(Calibration calibration, RankAgent agent, double budget,
                std::vector<int64_t> buckets, int64_t update_steps, bool with_gates,
                std::shared_ptr<const LatencyTable> latency)
      : calibration_(std::move(calibration)),
        agent_(std::move(agent)),
        budget_(budget),
        buckets_(std::move(buckets)),
        update_steps_(update_steps),
        with_gates_(with_gates),
        latency_(std::move(latency)),
        digest_(calibration_.digest()) {}

  std::vector<Ranks> decide(const LayerObservation& o) override {
    at::NoGradGuard no_grad;
    check_fits(calibration_, o);
    const Priced& priced = priced_for(o);
    const RankAgent::Factors factors = factors_of(o);
    const auto damage = factors.damage.accessor<double, 4>();    // [items, 2, ranks, 1 + gates]
    const auto entries = factors.entries.accessor<double, 3>();  // [items, ranks + 1, gates]
    std::vector<Ranks> result;
    for (int64_t item = 0; item < o.items(); ++item) {
      const int64_t pair = o.first_pair + item % o.pair_count();
      const int64_t g = o.first_group + item / o.pair_count() % o.groups;
      result.push_back(priced.least(o.layer, g, pair, damage[item], entries[item]));
    }
    return result;
  }

  // An agent that is not trusted is not asked.
  std::vector<int64_t> state_ranks() const override {
    return agent_.strength() > 0 ? calibration_.ranks : std::vector<int64_t>();
  }
  double flops_per_pair() const override { return agent_.strength() > 0 ? agent_.flops() : 0; }

  void set_calibration(const Calibration& calibration) override {
    calibration_ = calibration;
    digest_ = calibration_.digest();
    prices_.clear();
  }

  std::string describe() const override {
    return c10::str("rl", with_gates_ ? " with gates" : "", ", budget ", budget_,
                    latency_ ? " of the " + latency_->describe() : "", ", calibrated on ",
                    calibration_.tokens, " tokens of ", calibration_.data, " (", digest_,
                    "), agent ", agent_.digest(), ", strength ", agent_.strength());
  }

 private:
  struct Priced {
    RankCandidates choices;
    double price;  // of a unit of cost, in damage

    // What is least in damage and price together for one pair, by factors on each calibrated damage
    // and on entries. Given the gate, scores and values do not depend on each other.
    Ranks least(int64_t layer, int64_t group, int64_t pair,
                const at::TensorAccessor<double, 3>& damage_factors,
                const at::TensorAccessor<double, 2>& entry_factors) const {
      Ranks best{};
      double value = std::numeric_limits<double>::infinity();
      for (int64_t gate = -1; gate < static_cast<int64_t>(choices.gates.size()); ++gate) {
        Ranks ranks{};
        double sum = 0;
        for (int64_t kind = 0; kind < 2; ++kind) {
          double least_of_kind = std::numeric_limits<double>::infinity();
          for (size_t i = 0; i < choices.ranks.size(); ++i) {
            const double damage = choices.damage(layer, group, kind, pair, i, gate);
            double cost = choices.cost(pair, kind, i);
            if (kind == 0 && gate >= 0) {
              cost += choices.gate_cost(
                  layer, group, pair, i, gate,
                  entry_factors[i < choices.columns.size() ? choices.columns[i]
                                                           : entry_factors.size(0) - 1][gate]);
            }
            if (const double all = (damage > 0
                                        ? damage_factors[kind][choices.columns[i]][1 + gate] *
                                              damage
                                        : 0) +
                                   price * cost;
                all < least_of_kind) {
              least_of_kind = all;
              (kind == 0 ? ranks.qk : ranks.v) = choices.ranks[i];
            }
          }
          sum += least_of_kind;
        }
        if (sum < value) {
          value = sum;
          best = ranks;
          if (gate >= 0) {
            best.gate = choices.gates[static_cast<size_t>(gate)];
          }
        }
      }
      return best;
    }
  };

  // Of items, not logarithms: float64 [items, ..].
  RankAgent::Factors factors_of(const LayerObservation& o) {
    if (agent_.strength() == 0) {
      const auto ranks = static_cast<int64_t>(calibration_.ranks.size()),
                 gates = calibration_.gate_count();
      return {at::ones({o.items(), 2, ranks, 1 + gates}, at::kDouble),
              at::ones({o.items(), ranks + 1, gates}, at::kDouble)};
    }
    RankAgent::Memory&
        memory = memories_[o.first_pair];  // what the layers below saw of the same pairs
    if (o.layer == 0) {
      memory = {};
    }
    const auto
        group = at::arange(o.items(), at::kLong).div(o.pair_count(), "floor").remainder(o.groups) +
                o.first_group;
    const RankAgent::Factors logs = agent_.forward(o.state.flatten(0, 2).unsqueeze(1), group,
                                                   o.layer, &memory);
    const auto of_items = [](const at::Tensor& x) {
      return x.squeeze(1).exp().to(at::kDouble).contiguous();
    };
    return {of_items(logs.damage), of_items(logs.entries)};
  }

  const Priced& priced_for(const LayerObservation& o) {
    const auto key = std::pair(o.tree.sequence_length(), o.heads / o.groups);
    auto found = prices_.find(key);
    if (found == prices_.end()) {
      const double price = allocate(calibration_, o.tree,
                                    {.budget = budget_,
                                     .heads_per_group = key.second,
                                     .buckets = buckets_,
                                     .update_steps = update_steps_,
                                     .with_gates = with_gates_,
                                     .latency = latency_.get()})
                               .lambda *
                           agent_.price_factor(budget_);
      const int64_t groups = calibration_.groups(), d = calibration_.head_dim();
      const CostModel costs = cost_model_of(latency_.get(), o.tree, groups, key.second, d,
                                            update_steps_);
      found = prices_
                  .emplace(key, Priced{RankCandidates(calibration_, o.tree, buckets_, costs,
                                                      with_gates_),
                                       price})
                  .first;
    }
    return found->second;
  }

  Calibration calibration_;
  RankAgent agent_;
  double budget_;
  std::vector<int64_t> buckets_;
  int64_t update_steps_;
  bool with_gates_;
  std::shared_ptr<const LatencyTable> latency_;
  std::string digest_;  // as above
  std::map<std::pair<int64_t, int64_t>, Priced> prices_;
  std::map<int64_t, RankAgent::Memory> memories_;  // by first pair
};

}  // namespace

void RankPolicy::set_calibration(const Calibration& /*calibration*/) {
  raise(ErrorKind::kUsage, "the rank policy '", describe(),
        "' does not decide by calibrated damages; dp and rl do");
}

std::vector<int64_t> rank_buckets(const at::Device& device, int64_t head_dim) {
  const int64_t step = head_dim < 64 ? std::max<int64_t>(1, head_dim / 4)
                                     : (device.is_cuda() ? 32 : 16);
  std::vector<int64_t> buckets;
  for (int64_t rank = step; rank < head_dim; rank += step) {
    buckets.push_back(rank);
  }
  buckets.push_back(head_dim);
  return buckets;
}

std::unique_ptr<RankPolicy> make_exact_policy() {
  return std::make_unique<ExactPolicy>();
}

std::unique_ptr<RankPolicy> make_fixed_policy(int64_t rank, int64_t head_dim) {
  check(ErrorKind::kUsage, rank >= 1 && rank <= head_dim, "rank ", rank,
        ", expected 1 to the model's head_dim ", head_dim);
  return std::make_unique<FixedPolicy>(rank);
}

std::unique_ptr<RankPolicy> make_energy_policy(double energy, std::vector<int64_t> buckets) {
  check(ErrorKind::kUsage, energy > 0 && energy <= 1, "energy to keep is ", energy,
        ", expected more than 0 and at most 1");
  return std::make_unique<EnergyPolicy>(energy, std::move(buckets));
}

std::unique_ptr<RankPolicy> make_dropping_policy(std::unique_ptr<RankPolicy> policy, double drop) {
  return std::make_unique<DroppingPolicy>(std::move(policy), drop);
}

std::unique_ptr<RankPolicy> make_table_policy(RankTable table, std::string description) {
  return std::make_unique<TablePolicy>(std::move(table), std::move(description));
}

std::unique_ptr<RankPolicy> make_rl_policy(Calibration calibration, RankAgent agent, double budget,
                                           std::vector<int64_t> buckets, int64_t update_steps,
                                           bool with_gates,
                                           std::shared_ptr<const LatencyTable> latency) {
  check(ErrorKind::kUsage, budget > 0 && budget <= 1, "rank budget ", budget,
        ", expected more than 0 and at most 1");
  check(ErrorKind::kUsage, agent.strength() == 0 || agent.with_gates() == with_gates,
        "the agent has learned ", agent.with_gates() ? "with" : "without",
        " gates and shall decide ", with_gates ? "with" : "without",
        " them: --gates must be the same as for drrl-policy train");
  return std::make_unique<LearnedPolicy>(std::move(calibration), std::move(agent), budget,
                                         std::move(buckets), update_steps, with_gates,
                                         std::move(latency));
}

std::unique_ptr<RankPolicy> make_dp_policy(Calibration calibration, double budget,
                                           std::vector<int64_t> buckets, int64_t update_steps,
                                           bool with_gates,
                                           std::shared_ptr<const LatencyTable> latency) {
  return std::make_unique<AllocatedPolicy>(std::move(calibration),
                                           AllocationRequest{.budget = budget,
                                                             .heads_per_group = 0,
                                                             .buckets = std::move(buckets),
                                                             .update_steps = update_steps,
                                                             .with_gates = with_gates},
                                           std::move(latency));
}

std::unique_ptr<RankPolicy> make_greedy_policy(Calibration calibration, double budget,
                                               std::vector<int64_t> buckets, int64_t update_steps,
                                               std::shared_ptr<const LatencyTable> latency) {
  return std::make_unique<AllocatedPolicy>(std::move(calibration),
                                           AllocationRequest{.budget = budget,
                                                             .heads_per_group = 0,
                                                             .buckets = std::move(buckets),
                                                             .update_steps = update_steps,
                                                             .method = AllocationMethod::kGreedy},
                                           std::move(latency));
}

std::unique_ptr<RankPolicy> make_random_policy(Calibration calibration, double budget,
                                               std::vector<int64_t> buckets, int64_t update_steps,
                                               uint64_t seed,
                                               std::shared_ptr<const LatencyTable> latency) {
  return std::make_unique<AllocatedPolicy>(std::move(calibration),
                                           AllocationRequest{.budget = budget,
                                                             .heads_per_group = 0,
                                                             .buckets = std::move(buckets),
                                                             .update_steps = update_steps,
                                                             .method = AllocationMethod::kRandom,
                                                             .seed = seed},
                                           std::move(latency));
}

}  // namespace drrl
