#include "policy/agent_training.h"

#include <torch/optim/adamw.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "core/cost.h"
#include "core/error.h"
#include "policy/state.h"

namespace drrl {
namespace {

constexpr double kFirstTemperature = 0.3, kLastTemperature = 0.03;  // of what exact costs

// Sequences of one trace file as tensors over N = sequences x groups x pairs items: [N, layers, ..].
struct Items {
  at::Tensor state, group;
  at::Tensor base;        // calibrated damage [N, layers, 2, ranks], nats over the sequence
  at::Tensor damage[Traces::kDraws];  // measured, likewise
  at::Tensor operations;  // [N, 1, 2, ranks + 1]
  int64_t sequences;

  at::Tensor mean_damage() const { return (damage[0] + damage[1]) / 2; }
};

struct Length {
  const Traces* traces;
  Items train, validation, held_out;
  double exact, fixed, watching;        // operations of one sequence: exact attention, what nothing changes, states and network (none at strength 0)
  std::vector<double> budgets, prices;  // that can be met; nats over the sequence for one operation
};

// [sequences, layers, groups, .., pairs, x] -> [sequences groups pairs, layers, .., x]
at::Tensor by_item(const at::Tensor& x) {
  return x.dim() == 5 ? x.permute({0, 2, 3, 1, 4}).flatten(0, 2) : x.permute({0, 2, 4, 1, 3, 5}).flatten(0, 2);
}

Items items_of(const Traces& t, int64_t begin, int64_t count, const at::Tensor& base, const at::Tensor& operations, const at::Tensor& scale) {
  Items items;
  const int64_t groups = t.state.size(2), pairs = t.state.size(3);
  items.sequences = count;
  items.state = by_item(t.state.narrow(0, begin, count));
  items.group = at::arange(groups, at::kLong).view({1, groups, 1}).expand({count, groups, pairs}).flatten();
  items.base = by_item(base.unsqueeze(0).expand({count, -1, -1, -1, -1, -1}));
  for (int64_t draw = 0; draw < Traces::kDraws; ++draw) {
    items.damage[draw] = by_item(t.damage.narrow(0, begin, count).select(1, draw)) * scale.view({1, 1, 2, 1});
  }
  items.operations = operations.expand({count, groups, -1, -1, -1}).flatten(0, 2).unsqueeze(1);
  return items;
}

// Costs of all choices, exact last: [N, layers, 2, ranks + 1].
at::Tensor costs(const at::Tensor& damage, const Items& items, double price) {
  return at::constant_pad_nd(damage, {0, 1}) + price * items.operations;
}

// The choices of least estimated cost, and what they spoil and take.
struct Outcome {
  double damage, operations;  // of one sequence
};
Outcome outcome(const at::Tensor& estimate, const at::Tensor& truth, const Items& items, double price) {
  const auto chosen = costs(estimate, items, price).argmin(3, /*keepdim=*/true);
  const auto sum = [&](const at::Tensor& x) {
    return x.expand({-1, chosen.size(1), -1, -1}).gather(3, chosen).sum(at::kDouble).item<double>() / static_cast<double>(items.sequences);
  };
  return {sum(at::constant_pad_nd(truth, {0, 1})), sum(items.operations)};
}

// The price at which decisions by `estimate` take the allowed operations.
double price_for(const at::Tensor& estimate, const Items& items, double allowed) {
  double low = 1e-18, high = 1e3;
  for (int step = 0; step < 60; ++step) {
    const double middle = std::sqrt(low * high);
    (outcome(estimate, estimate, items, middle).operations <= allowed ? high : low) = middle;
  }
  return high;
}

at::Tensor factors_of(const RankAgent& agent, const Items& items) { return agent.forward(items.state, items.group, 0); }

at::Tensor estimate_of(const RankAgent& agent, const Items& items) {
  at::NoGradGuard no_grad;
  return items.base * factors_of(agent, items).exp();
}

}  // namespace

std::vector<BudgetReport> train_agent(RankAgent& agent, const Calibration& calibration, const std::vector<Traces>& traces,
                                      const AgentTrainingOptions& options, const std::function<void(const std::string&)>& log) {
  const int64_t layers = calibration.layers(), groups = calibration.groups(), d = calibration.head_dim();
  check(ErrorKind::kUsage, !traces.empty(), "no traces to learn from");
  std::vector<Length> lengths;
  for (const Traces& t : traces) {
    check(ErrorKind::kUsage, t.calibration == calibration.digest() && t.ranks == calibration.ranks && t.state.size(1) == layers && t.state.size(2) == groups,
          "traces of the calibration ", t.calibration, ", expected ", calibration.digest(), ": record them again");
    check(ErrorKind::kUsage, options.held_out >= 1 && options.validation >= 1 && t.sequences() > options.held_out + options.validation, "traces of ",
          t.sequences(), " sequences, of which ", options.held_out, " are held out and ", options.validation,
          " are for validation: at least one must be each and one must be left");
    const BlockTree tree(t.seq_len, t.geometry);
    const Prices prices = operation_prices(tree, groups, t.heads_per_group, d, options.update_steps);
    const Choices choices(calibration, tree, options.buckets, prices);
    check(ErrorKind::kUsage, choices.columns.size() == calibration.ranks.size(), "the device's ranks ", at::IntArrayRef(options.buckets),
          " leave out some of the calibrated ones, ", at::IntArrayRef(calibration.ranks));
    const int64_t pairs = tree.num_pairs(), ranks = static_cast<int64_t>(calibration.ranks.size());
    const auto base = at::empty({layers, groups, 2, pairs, ranks});
    const auto operations = at::empty({pairs, 2, ranks + 1});
    for (int64_t pair = 0; pair < pairs; ++pair) {
      for (int64_t kind = 0; kind < 2; ++kind) {
        for (int64_t i = 0; i <= ranks; ++i) {
          operations[pair][kind][i] = choices.cost(pair, kind, static_cast<size_t>(i));
        }
        for (int64_t layer = 0; layer < layers; ++layer) {
          for (int64_t group = 0; group < groups; ++group) {
            for (int64_t i = 0; i < ranks; ++i) {
              base[layer][group][kind][pair][i] = choices.damage(layer, group, kind, pair, static_cast<size_t>(i)) * static_cast<double>(t.seq_len);
            }
          }
        }
      }
    }
    // Calibrated damages are scaled to what all layers do together; measured ones are scaled alike.
    const int64_t train = t.sequences() - options.held_out - options.validation;
    const auto measured = t.damage.narrow(0, 0, train).sum(at::IntArrayRef{0, 1, 2, 3, 5, 6}, /*keepdim=*/false, at::kDouble) / static_cast<double>(train * Traces::kDraws);
    const auto scale = (base.sum(at::IntArrayRef{0, 1, 3, 4}, /*keepdim=*/false, at::kDouble) / measured.clamp_min(1e-300)).to(at::kFloat);
    Length length;
    length.traces = &t;
    length.train = items_of(t, 0, train, base, operations, scale);
    length.validation = items_of(t, train, options.validation, base, operations, scale);
    length.held_out = items_of(t, train + options.validation, options.held_out, base, operations, scale);
    length.exact = static_cast<double>(layers) * prices.exact;
    length.fixed = static_cast<double>(layers) * prices.fixed;
    length.watching = static_cast<double>(layers * groups * pairs) * (start_loss_flops(d) + agent.flops());
    for (const double budget : options.budgets) {
      try {
        length.prices.push_back(allocate(calibration, budget, tree, t.heads_per_group, options.buckets, options.update_steps).price *
                                static_cast<double>(t.seq_len));
        length.budgets.push_back(budget);
      } catch (const Error&) {  // cannot be met at this length
      }
    }
    check(ErrorKind::kUsage, !length.budgets.empty(), "none of the budgets can be met at ", t.seq_len, " tokens");
    lengths.push_back(std::move(length));
  }

  {  // states to mean 0 and deviation 1, by layer and group, over all lengths
    std::vector<at::Tensor> all;
    for (const Length& l : lengths) {
      all.push_back(l.train.state.view({l.train.sequences, groups, -1, layers, l.train.state.size(2)}).permute({3, 1, 0, 2, 4}).flatten(2, 3));
    }
    const auto rows = at::cat(all, 2);  // [layers, groups, rows, features]
    agent.set_normalization(rows.mean(2).contiguous(), rows.std(2, /*unbiased=*/false).clamp_min(0.05).contiguous());
  }

  std::mt19937_64 random(options.seed);
  const auto pick = [&](size_t n) { return static_cast<size_t>(random() % n); };
  const auto optimize = [&](const char* stage, int64_t steps, auto&& loss_of) {
    torch::optim::AdamW optimizer(agent.parameters(), torch::optim::AdamWOptions(options.lr).weight_decay(0.01));
    double sum = 0;
    for (int64_t step = 0; step < steps; ++step) {
      const double done = static_cast<double>(step) / static_cast<double>(steps);
      for (auto& group : optimizer.param_groups()) {
        static_cast<torch::optim::AdamWOptions&>(group.options()).lr(options.lr * (1 - 0.9 * done));
      }
      optimizer.zero_grad();
      const at::Tensor loss = loss_of(lengths[pick(lengths.size())], done);
      const double value = loss.item<double>();
      check(ErrorKind::kNumerics, std::isfinite(value), "agent: the loss of step ", step, " of the ", stage, " is ", value);
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
    const auto f = factors_of(agent, l.train);
    const auto y = (l.train.mean_damage() / l.train.base.clamp_min(1e-30)).clamp_max(std::exp(2 * RankAgent::kLimit));
    return (y * (-f).exp() + f).mean();
  });
  optimize("policy gradient", options.reward_steps, [&](const Length& l, double done) {
    const double price = l.prices[pick(l.prices.size())];
    const auto exact = (price * l.train.operations).narrow(3, l.train.operations.size(3) - 1, 1);
    const double temperature = kFirstTemperature * std::pow(kLastTemperature / kFirstTemperature, done);
    const auto estimated = costs(l.train.base * factors_of(agent, l.train).exp(), l.train, price);
    const auto choice = at::softmax(-estimated / (temperature * exact), 3);
    const auto truth = costs(l.train.mean_damage(), l.train, price);
    return (choice * truth).sum() / (exact.sum() * static_cast<double>(layers));
  });

  double best = 0, least = INFINITY;
  for (const double strength : {0.0, 0.25, 0.5, 0.75, 1.0}) {
    agent.set_strength(strength);
    double cost = 0;  // sum over budgets of the logarithm of the damage at equal operations
    for (const Length& l : lengths) {
      const auto estimate = estimate_of(agent, l.validation);
      const double watching = strength > 0 ? l.watching : 0;
      for (const double budget : l.budgets) {
        const double price = price_for(estimate, l.validation, budget * l.exact - l.fixed - watching);
        cost += std::log(outcome(estimate, l.validation.mean_damage(), l.validation, price).damage);
      }
    }
    log(c10::str("strength ", strength, ": validation damage e^", cost));
    if (cost < least) {
      best = strength;
      least = cost;
    }
  }
  agent.set_strength(best);
  for (Length& l : lengths) {
    l.watching = best > 0 ? l.watching : 0;
  }

  // Prices that meet each budget on average over the lengths.
  std::vector<double> budgets, factors;
  for (const double budget : options.budgets) {
    std::vector<double> found;
    for (const Length& l : lengths) {
      const auto at = std::find(l.budgets.begin(), l.budgets.end(), budget);
      if (at != l.budgets.end()) {
        const double price = price_for(estimate_of(agent, l.train), l.train, budget * l.exact - l.fixed - l.watching);
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

  std::vector<BudgetReport> reports;
  for (const Length& l : lengths) {
    const auto tokens = static_cast<double>(l.traces->seq_len);
    const Items& held = l.held_out;
    const auto mean = l.train.mean_damage().view({l.train.sequences, -1, layers, 2, l.train.base.size(3)}).mean(0);
    const auto refitted = mean.unsqueeze(0).expand({held.sequences, -1, -1, -1, -1}).flatten(0, 1);
    for (size_t i = 0; i < l.budgets.size(); ++i) {
      const double allowed = l.budgets[i] * l.exact - l.fixed;
      const auto judged = [&](const at::Tensor& estimate, const at::Tensor& truth, double operations) {
        return outcome(estimate, truth, held, price_for(estimate, held, operations)).damage / tokens;
      };
      const auto estimate = estimate_of(agent, held);
      BudgetReport r{l.traces->seq_len, l.budgets[i], judged(held.base, held.mean_damage(), allowed), judged(refitted, held.mean_damage(), allowed), 0, 0, 0};
      const Outcome mine = outcome(estimate, held.mean_damage(), held, l.prices[i] * agent.price_factor(l.budgets[i]));
      r.agent = judged(estimate, held.mean_damage(), allowed - l.watching);
      r.agent_operations = (mine.operations + l.fixed + l.watching) / l.exact;
      r.oracle = 0.5 * (judged(held.damage[0], held.damage[1], allowed) + judged(held.damage[1], held.damage[0], allowed));
      reports.push_back(r);
    }
  }
  return reports;
}

}  // namespace drrl
