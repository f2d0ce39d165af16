#include "policy/agent/agent_training.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>

#include <torch/optim/adamw.h>

#include "core/attention/flops.h"
#include "core/error.h"
#include "policy/allocation/allocation.h"
#include "policy/allocation/candidates.h"
#include "policy/allocation/latency_table.h"
#include "policy/calibration/pair_features.h"

namespace drrl {
namespace {

constexpr double kErrors = 2;  // standard errors by which an agent must gain to be trusted
constexpr double kFirstTemperature = 0.3, kLastTemperature = 0.03;  // of what exact costs

// Sequences of one trace file as tensors over N = sequences x groups x pairs items. What can be
// chosen for an item at a layer is a rank of the scores and one of the values, exact the last, and
// a gate, none the first.
struct Items {
  at::Tensor state, group;  // [N, layers, features], [N]
  at::Tensor base;  // calibrated damage, [N, layers, 2, ranks, 1 + gates], nats over the sequence
  at::Tensor damage[Traces::kDraws];  // measured, likewise
  at::Tensor mean_damage;             // of the draws
  at::Tensor pair_cost;               // what no text changes, [N, 1, 2, ranks + 1, 1 + gates]
  at::Tensor base_entries;  // what the calibrated share of exact entries costs, [N, layers, ranks +
                            // 1, gates]
  at::Tensor entries;       // and that which was met, likewise
  int64_t sequences;
};

// Damages and costs of all choices, [N, layers, 2, ranks + 1, 1 + gates] each; a pair's entries are
// on the account of its scores.
struct Choice {
  at::Tensor damage, cost;
};

struct Length {
  const Traces* traces;
  Items train, validation, held_out;
  Choice train_truth;             // measured(train)
  double exact, fixed, watching;  // cost of one sequence: exact attention, what nothing changes,
                                  // states and network (none at strength 0)
  std::vector<double> budgets,
      prices;  // that can be met; nats over the sequence for a unit of cost
};

// [sequences, layers, groups, pairs, ..] -> [sequences groups pairs, layers, ..]
at::Tensor by_item(const at::Tensor& x) {
  return x.movedim(1, 3).flatten(0, 2);
}

Choice choice(const at::Tensor& damage, const Items& items, const at::Tensor& entries) {
  const auto zeros = at::zeros_like(entries);
  const auto of_gates = at::constant_pad_nd(at::stack({entries, zeros}, 2), {1, 0});
  return {at::constant_pad_nd(damage, {0, 0, 0, 1}), items.pair_cost + of_gates};
}
// As calibrated, as the agent estimates them, as they are.
Choice calibrated(const Items& items) {
  return choice(items.base, items, items.base_entries);
}
Choice estimated(const Items& items, const RankAgent::Factors& logs) {
  return choice(items.base * logs.damage.exp(), items, items.base_entries * logs.entries.exp());
}
Choice measured(const Items& items, const at::Tensor& damage) {
  return choice(damage, items, items.entries);
}
Choice measured(const Items& items) {
  return measured(items, items.mean_damage);
}

// The choices of least estimated damage and price, and what they really spoil and take. Given the
// gate, scores and values do not depend on each other.
struct Outcome {
  std::vector<double> damages;  // of each sequence
  double cost;                  // of one, on average
};
Outcome outcome(const Choice& estimate, const Choice& truth, int64_t sequences, double price) {
  const auto [least, ranks] = (estimate.damage + price * estimate.cost)
                                  .min(3, /*keepdim=*/true);  // [N, layers, 2, 1, 1 + gates]
  const auto
      gate = least.sum(2, /*keepdim=*/true).argmin(4, /*keepdim=*/true).expand({-1, -1, 2, -1, -1});
  const auto of_sequences = [&, ranks = ranks](const at::Tensor& x) {
    return x.gather(3, ranks)
        .gather(4, gate)
        .view({sequences, -1})
        .sum(1, /*keepdim=*/false, at::kDouble);
  };
  const at::Tensor damages = of_sequences(truth.damage);
  return {{damages.const_data_ptr<double>(), damages.const_data_ptr<double>() + sequences},
          of_sequences(truth.cost).mean().item<double>()};
}

// The price at which decisions by `estimate` really take what is allowed.
double price_for(const Choice& estimate, const Choice& truth, int64_t sequences, double allowed) {
  double low = 1e-18, high = 1e3;
  for (int step = 0; step < 50; ++step) {
    const double middle = std::sqrt(low * high);
    (outcome(estimate, truth, sequences, middle).cost <= allowed ? high : low) = middle;
  }
  return high;
}

// Expected damage and price of choices drawn from softmax(-estimate / temperature), of all items
// together.
at::Tensor expected(const Choice& estimate, const Choice& truth, double price,
                    const at::Tensor& temperature) {
  const auto logits = -(estimate.damage + price * estimate.cost) / temperature;
  const auto ranks = at::softmax(logits, 3);
  const auto gates = at::softmax(
      at::logsumexp(logits, {3}, /*keepdim=*/true).sum(2, /*keepdim=*/true), 4);
  return (ranks * gates * (truth.damage + price * truth.cost)).sum();
}

// Of the gates that can be chosen.
RankAgent::Factors factors_of(const RankAgent& agent, const Items& items) {
  const RankAgent::Factors logs = agent.forward(items.state, items.group, 0);
  return {logs.damage.narrow(4, 0, items.base.size(4)),
          logs.entries.narrow(3, 0, items.entries.size(3))};
}

Choice estimate_of(const RankAgent& agent, const Items& items) {
  at::NoGradGuard no_grad;
  return estimated(items, factors_of(agent, items));
}

// -(log likelihood), up to a constant, of positive y that is base e^log_factor times gamma noise of
// any shape; where nothing is calibrated there is nothing to fit.
at::Tensor gamma_deviance(const at::Tensor& y, const at::Tensor& base,
                          const at::Tensor& log_factor) {
  const auto counts = base > 1e-30;
  const auto ratio = at::where(counts, y / base.clamp_min(1e-30), 1)
                         .clamp_max(std::exp(2 * RankAgent::kLimit));
  return (ratio * (-log_factor).exp() + log_factor).mean();
}

// What a trace file says of some of its sequences.
class TraceItems {
 public:
  TraceItems(const Traces& t, const Calibration& calibration, const CostModel& prices,
             const AgentTrainingOptions& options)
      : traces_(t) {
    const BlockTree tree(t.seq_len, t.geometry);
    const RankCandidates choices(calibration, tree, options.buckets, prices, options.with_gates);
    check(ErrorKind::kUsage, choices.columns.size() == calibration.ranks.size(),
          "the device's ranks ", at::IntArrayRef(options.buckets),
          " leave out some of the calibrated ones, ", at::IntArrayRef(calibration.ranks));
    const int64_t layers = calibration.layers(), groups = calibration.groups(),
                  pairs = tree.num_pairs(), ranks = static_cast<int64_t>(calibration.ranks.size());
    gates_ = static_cast<int64_t>(choices.gates.size());
    base_ = at::empty({layers, groups, pairs, 2, ranks, 1 + gates_});
    base_entries_ = at::empty({layers, groups, pairs, ranks + 1, gates_});
    pair_cost_ = at::empty({1, groups, pairs, 2, ranks + 1, 1 + gates_});
    entry_cost_ = at::empty({pairs, 1, 1});
    auto base = base_.accessor<float, 6>(), pair_cost = pair_cost_.accessor<float, 6>();
    auto base_entries = base_entries_.accessor<float, 5>();
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const auto run = static_cast<size_t>(choices.run_of[static_cast<size_t>(pair)]);
      entry_cost_[pair].fill_(choices.exact_costs[run]);
      for (int64_t i = 0; i <= ranks; ++i) {
        const auto at = static_cast<size_t>(i);
        for (int64_t gate = -1; gate < gates_; ++gate) {
          for (int64_t group = 0; group < groups; ++group) {
            for (int64_t kind = 0; kind < 2; ++kind) {
              pair_cost[0][group][pair][kind][i][1 + gate] = static_cast<float>(
                  choices.cost(pair, kind, at) +
                  (kind == 0 && gate >= 0 ? choices.gated_costs[run] : 0));
            }
            for (int64_t layer = 0; layer < layers; ++layer) {
              for (int64_t kind = 0; kind < 2 && i < ranks; ++kind) {
                base[layer][group][pair][kind][i][1 + gate] = static_cast<float>(
                    choices.damage(layer, group, kind, pair, at, gate) *
                    static_cast<double>(t.seq_len));
              }
              if (gate >= 0) {
                base_entries[layer][group][pair][i][gate] = static_cast<float>(
                    choices.gate_cost(layer, group, pair, at, gate) - choices.gated_costs[run]);
              }
            }
          }
        }
      }
    }
    // Calibrated damages are scaled to what all layers do together; measured ones are scaled alike.
    const int64_t train = t.sequences() - options.held_out - options.validation;
    const auto of_kinds = t.damage.narrow(0, 0, train)
                              .sum(at::IntArrayRef{0, 1, 2, 3, 5, 6}, /*keepdim=*/false,
                                   at::kDouble) /
                          static_cast<double>(train * Traces::kDraws);
    const auto calibrated = base_.select(5, 0).sum(at::IntArrayRef{0, 1, 2, 4}, /*keepdim=*/false,
                                                   at::kDouble);
    scale_ = at::where(of_kinds > 0, calibrated / of_kinds, at::ones_like(calibrated))
                 .to(at::kFloat)
                 .view({2, 1, 1});  // text without damage has nothing to scale
  }

  Items of(int64_t begin, int64_t count) const {
    const Traces& t = traces_;
    const auto some = [&](const at::Tensor& x) { return x.narrow(0, begin, count); };
    const auto for_all = [&](const at::Tensor& x) {
      auto sizes = x.sizes().vec();
      sizes.insert(sizes.begin(), count);
      return by_item(x.unsqueeze(0).expand(sizes));
    };
    const int64_t groups = t.state.size(2), pairs = t.state.size(3);
    Items items;
    items.sequences = count;
    items.state = by_item(some(t.state));
    items.group = at::arange(groups, at::kLong)
                      .view({1, groups, 1})
                      .expand({count, groups, pairs})
                      .flatten();
    items.base = for_all(base_);
    items.pair_cost = for_all(pair_cost_);
    items.base_entries = for_all(base_entries_);
    items.entries = by_item(some(t.exact_entries).narrow(5, 0, gates_) * entry_cost_);
    for (int64_t draw = 0; draw < Traces::kDraws; ++draw) {
      const auto of_draw = [&](const at::Tensor& x) {
        return some(x).select(1, draw).movedim(3, 4);
      };  // [sequences, layers, groups, pairs, 2, ranks, ..]
      items.damage[draw] = by_item(at::cat({of_draw(t.damage).unsqueeze(6),
                                            of_draw(t.gated_damage).narrow(6, 0, gates_)},
                                           6)) *
                           scale_;
    }
    items.mean_damage = (items.damage[0] + items.damage[1]) / 2;
    return items;
  }

 private:
  const Traces& traces_;
  int64_t gates_;
  at::Tensor base_, base_entries_, pair_cost_, entry_cost_, scale_;
};

// The strength in {0, 1/4, .. 1} whose gain over 0 on the validation sequences, less kErrors of its
// standard errors, is largest.
double trusted_strength(RankAgent& agent, const std::vector<Length>& lengths,
                        const std::function<void(const std::string&)>& log) {
  double best = 0, least = 0;
  std::vector<std::vector<double>>
      untrusted;  // damages at strength 0, of each length and budget, by sequence
  for (const double strength : {0.0, 0.25, 0.5, 0.75, 1.0}) {
    agent.set_strength(strength);
    double change = 0, variance = 0,
           unwatched = 0;  // of the logarithm of the damage, summed over lengths and budgets; if
                           // states and network were free
    size_t run = 0;
    for (const Length& l : lengths) {
      const Choice estimate = estimate_of(agent, l.validation), truth = measured(l.validation);
      const int64_t sequences = l.validation.sequences;
      std::vector<double> shares(static_cast<size_t>(sequences),
                                 0);  // what each sequence adds to the change
      for (const double budget : l.budgets) {
        const auto damages = [&](double watching) {
          return outcome(
                     estimate, truth, sequences,
                     price_for(estimate, truth, sequences, budget * l.exact - l.fixed - watching))
              .damages;
        };
        const std::vector<double> met = damages(strength > 0 ? l.watching : 0);
        if (strength == 0) {
          untrusted.push_back(met);
        }
        const std::vector<double>& before = untrusted[run++];
        const double mean = mean_damage(met), mean_before = mean_damage(before);
        change += std::log(mean / mean_before);
        unwatched += std::log(mean_damage(damages(0)) / mean_before);
        for (size_t i = 0; i < shares.size(); ++i) {
          shares[i] += met[i] / mean - before[i] / mean_before;
        }
      }
      variance += std::inner_product(shares.begin(), shares.end(), shares.begin(), 0.0) /
                  static_cast<double>(sequences * (sequences - 1));
    }
    const double error = std::sqrt(variance);
    log(c10::str("strength ", strength, ": validation damage e^(", change, " +- ", error,
                 ") of that of the calibration's choices, were states and network free e^",
                 unwatched));
    if (change + kErrors * error < least) {
      best = strength;
      least = change + kErrors * error;
    }
  }
  return best;
}

}  // namespace

double mean_damage(const std::vector<double>& sequences) {
  return std::accumulate(sequences.begin(), sequences.end(), 0.0) /
         static_cast<double>(sequences.size());
}

std::vector<BudgetReport> train_agent(RankAgent& agent, const Calibration& calibration,
                                      const std::vector<Traces>& traces,
                                      const AgentTrainingOptions& options,
                                      const std::function<void(const std::string&)>& log) {
  const int64_t layers = calibration.layers(), groups = calibration.groups(),
                d = calibration.head_dim();
  check(ErrorKind::kUsage, !traces.empty(), "no traces to learn from");
  std::vector<Length> lengths;
  for (const Traces& t : traces) {
    check(ErrorKind::kUsage,
          t.calibration == calibration.digest() && t.ranks == calibration.ranks &&
              t.state.size(1) == layers && t.state.size(2) == groups,
          "traces of the calibration ", t.calibration, ", expected ", calibration.digest(),
          ": record them again");
    check(ErrorKind::kUsage,
          options.held_out >= 1 && options.validation >= 2 &&
              t.sequences() > options.held_out + options.validation,
          "traces of ", t.sequences(), " sequences, of which ", options.held_out,
          " are held out and ", options.validation,
          " are for validation: at least one must be held out, two are for validation and one must "
          "be left");
    check(ErrorKind::kUsage,
          !options.with_gates || (calibration.gates.defined() && t.gates.equal(calibration.gates)),
          "the gates of traces and calibration are not the same: make both again");
    const BlockTree tree(t.seq_len, t.geometry);
    const CostModel costs = cost_model_of(options.latency.get(), tree, groups, t.heads_per_group, d,
                                          options.update_steps);
    const TraceItems items(t, calibration, costs, options);
    const int64_t train = t.sequences() - options.held_out - options.validation;
    Length length;
    length.traces = &t;
    length.train = items.of(0, train);
    length.train_truth = measured(length.train);
    length.validation = items.of(train, options.validation);
    length.held_out = items.of(train + options.validation, options.held_out);
    length.exact = static_cast<double>(layers) * costs.exact;
    length.fixed = static_cast<double>(layers) * costs.fixed;
    const double of_operation = costs.exact / flops_cost_model(tree, groups, t.heads_per_group, d,
                                                               options.update_steps)
                                                  .exact;
    length.watching = static_cast<double>(layers * groups * tree.num_pairs()) *
                      (start_loss_flops(d) + agent.flops()) * of_operation;
    for (const double budget : options.budgets) {
      try {
        const Allocation dp = allocate(calibration, tree,
                                       {.budget = budget,
                                        .heads_per_group = t.heads_per_group,
                                        .buckets = options.buckets,
                                        .update_steps = options.update_steps,
                                        .with_gates = options.with_gates,
                                        .latency = options.latency.get()});
        length.prices.push_back(dp.lambda * static_cast<double>(t.seq_len));
        length.budgets.push_back(budget);
      } catch (const Error&) {  // cannot be met at this length
      }
    }
    check(ErrorKind::kUsage, !length.budgets.empty(), "none of the budgets can be met at ",
          t.seq_len, " tokens");
    lengths.push_back(std::move(length));
  }

  {  // states to mean 0 and deviation 1, by layer and group, over all lengths
    std::vector<at::Tensor> all;
    for (const Length& l : lengths) {
      all.push_back(
          l.train.state.view({l.train.sequences, groups, -1, layers, l.train.state.size(2)})
              .permute({3, 1, 0, 2, 4})
              .flatten(2, 3));
    }
    const auto rows = at::cat(all, 2);  // [layers, groups, rows, features]
    agent.set_normalization(rows.mean(2).contiguous(),
                            rows.std(2, /*unbiased=*/false).clamp_min(0.05).contiguous());
  }

  std::mt19937_64 random(options.seed);
  const auto pick = [&](size_t n) { return static_cast<size_t>(random() % n); };
  const auto optimize = [&](const char* stage, int64_t steps, auto&& loss_of) {
    torch::optim::AdamW optimizer(agent.parameters(),
                                  torch::optim::AdamWOptions(options.lr).weight_decay(0.01));
    double sum = 0;
    for (int64_t step = 0; step < steps; ++step) {
      const double done = static_cast<double>(step) / static_cast<double>(steps);
      for (auto& group : optimizer.param_groups()) {
        static_cast<torch::optim::AdamWOptions&>(group.options()).lr(options.lr * (1 - 0.9 * done));
      }
      optimizer.zero_grad();
      const at::Tensor loss = loss_of(lengths[pick(lengths.size())], done);
      const double value = loss.item<double>();
      check(ErrorKind::kNumerics, std::isfinite(value), "agent: the loss of step ", step,
            " of the ", stage, " is ", value);
      loss.backward();
      optimizer.step();
      sum += value;
      if ((step + 1) % 50 == 0) {
        log(c10::str(stage, " step ", step + 1, "/", steps, "  loss ", sum / 50));
        sum = 0;
      }
    }
  };
  optimize("value fit", options.fit_steps, [&](const Length& l, double) {
    const Items& items = l.train;
    const RankAgent::Factors logs = factors_of(agent, items);
    const auto of_damage = gamma_deviance(items.mean_damage, items.base, logs.damage);
    return options.with_gates
               ? of_damage + gamma_deviance(items.entries, items.base_entries, logs.entries)
               : of_damage;
  });
  optimize("policy gradient", options.reward_steps, [&](const Length& l, double done) {
    const Items& items = l.train;
    const double price = l.prices[pick(l.prices.size())];
    const auto exact = price * items.pair_cost.select(4, 0).select(
                                   3, items.pair_cost.size(3) - 1);  // [N, 1, 2]
    const double temperature = kFirstTemperature *
                               std::pow(kLastTemperature / kFirstTemperature, done);
    return expected(estimated(items, factors_of(agent, items)), l.train_truth, price,
                    (temperature * exact).unsqueeze(3).unsqueeze(4)) /
           (exact.sum() * static_cast<double>(layers));
  });

  const double best = trusted_strength(agent, lengths, log);
  agent.set_strength(best);
  for (Length& l : lengths) {
    l.watching = best > 0 ? l.watching : 0;
  }

  // CostModel that meet each budget on average over the lengths.
  std::vector<double> budgets, factors;
  for (const double budget : options.budgets) {
    std::vector<double> found;
    for (const Length& l : lengths) {
      const auto at = std::find(l.budgets.begin(), l.budgets.end(), budget);
      if (at != l.budgets.end()) {
        const double price = price_for(estimate_of(agent, l.train), l.train_truth,
                                       l.train.sequences, budget * l.exact - l.fixed - l.watching);
        found.push_back(std::log(price / l.prices[static_cast<size_t>(at - l.budgets.begin())]));
      }
    }
    if (!found.empty()) {
      double mean = 0;
      for (const double x : found) {
        mean += x / static_cast<double>(found.size());
      }
      budgets.push_back(budget);
      factors.push_back(std::exp(mean));
    }
  }
  agent.set_prices(budgets, factors);
  agent.set_with_gates(options.with_gates);

  std::vector<BudgetReport> reports;
  for (const Length& l : lengths) {
    const auto tokens = static_cast<double>(l.traces->seq_len);
    const Items& held = l.held_out;
    const auto mean_of =
        [&](const at::Tensor& x) {  // of the training sequences, for each that is held out
          const auto mean = x.unflatten(0, {l.train.sequences, -1}).mean(0);
          return at::cat(std::vector<at::Tensor>(static_cast<size_t>(held.sequences), mean));
        };
    const Choice dp = calibrated(held),
                 refitted = choice(mean_of(l.train.mean_damage), held, mean_of(l.train.entries)),
                 truth = measured(held);
    const std::array draws = {measured(held, held.damage[0]), measured(held, held.damage[1])};
    const Choice estimate = estimate_of(agent, held);
    for (size_t i = 0; i < l.budgets.size(); ++i) {
      const double allowed = l.budgets[i] * l.exact - l.fixed;
      const auto of_sequences = [&](const Choice& by, const Choice& as, double cost) {
        std::vector<double> damages = outcome(by, as, held.sequences,
                                              price_for(by, as, held.sequences, cost))
                                          .damages;
        std::transform(damages.begin(), damages.end(), damages.begin(),
                       [&](double nats) { return nats / tokens; });
        return damages;
      };
      const auto judged = [&](const Choice& by, const Choice& as, double cost) {
        return mean_damage(of_sequences(by, as, cost));
      };
      BudgetReport r{};
      r.seq_len = l.traces->seq_len;
      r.budget = l.budgets[i];
      r.dp = of_sequences(dp, truth, allowed);
      r.agent = of_sequences(estimate, truth, allowed - l.watching);
      r.refitted = judged(refitted, truth, allowed);
      r.oracle = 0.5 * (judged(draws[0], draws[1], allowed) + judged(draws[1], draws[0], allowed));
      r.bound = judged(truth, truth, allowed);
      r.agent_cost = (outcome(estimate, truth, held.sequences,
                              l.prices[i] * agent.price_factor(l.budgets[i]))
                          .cost +
                      l.fixed + l.watching) /
                     l.exact;
      reports.push_back(r);
    }
  }
  return reports;
}

}  // namespace drrl
