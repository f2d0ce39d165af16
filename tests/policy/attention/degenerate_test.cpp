// Degenerate inputs: low rank must not fail where exact attention is finite, and must be near it
// wherever the far field's rank is below the ranks it runs at. DRRL_TRIALS sets the number of
// random inputs (10000 takes some minutes), DRRL_SEED the first seed: a trial is its seed's alone.
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <limits>

#include <gtest/gtest.h>

#include "core/attention/exact_attention.h"
#include "core/attention/reference.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/calibration/calibration.h"
#include "policy/calibration/calibration_controller.h"
#include "policy/rank_policy.h"

namespace drrl {
namespace {

int64_t from_environment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoll(value);
}

// One gate for all pairs.
class GatedPolicy final : public RankPolicy {
 public:
  explicit GatedPolicy(Ranks ranks) : ranks_(ranks) {}
  std::vector<Ranks> decide(const LayerObservation& observation) override {
    return std::vector<Ranks>(static_cast<size_t>(observation.items()), ranks_);
  }
  std::string describe() const override {
    return c10::str("ranks ", ranks_.qk, " and ", ranks_.v, ", gate ", ranks_.gate);
  }

 private:
  Ranks ranks_;
};

class Draw {
 public:
  explicit Draw(uint64_t seed) { at::manual_seed(seed); }
  int64_t below(int64_t n) { return at::randint(n, {1}, at::kLong).item<int64_t>(); }
  template <typename T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }
};

// Rows [heads, length, d] of one kind, whose rank in each head is at most `rank`.
struct Rows {
  at::Tensor x;
  int64_t rank;
  std::string name;
};

Rows rows_of_kind(Draw& draw, int64_t heads, int64_t length, int64_t d) {
  const auto noise = [&](int64_t count) { return at::randn({heads, count, d}, at::kDouble); };
  const auto repeated = [&](int64_t different, const at::Tensor& which) {
    return Rows{noise(different).index_select(1, which), different,
                c10::str(different, " different rows")};
  };
  switch (draw.below(9)) {
    case 0: return {at::zeros({heads, length, d}, at::kDouble), 0, "zeros"};
    case 1: return repeated(1, at::zeros({length}, at::kLong));
    case 2: {  // few rows, in runs or scattered
      const int64_t different = draw.of<int64_t>({2, 3, 8});
      return repeated(different, draw.below(2) == 0
                                     ? at::randint(different, {length}, at::kLong)
                                     : (at::arange(length) * different).div(length, "floor"));
    }
    case 3: {  // a block over and over
      const int64_t period = draw.of<int64_t>({1, 5, 8});
      return repeated(period, at::arange(length).remainder(period));
    }
    case 4: {
      const int64_t rank = 1 + draw.below(4);
      return {at::matmul(at::randn({heads, length, rank}, at::kDouble),
                         at::randn({heads, rank, d}, at::kDouble)),
              rank, c10::str("rank ", rank)};
    }
    case 5: {  // a large bias in a few columns
      auto x = noise(length);
      x.narrow(2, draw.below(d - 2), 2) += std::pow(10.0, static_cast<double>(draw.below(5)));
      return {x, d, "bias"};
    }
    case 6:
      return {at::eye(d, at::kDouble)
                  .index_select(0, at::arange(length).remainder(d))
                  .unsqueeze(0)
                  .repeat({heads, 1, 1}),
              d, "unit vectors"};
    case 7: {  // one token over and over, then text
      const int64_t begin = draw.below(length);
      auto x = noise(length);
      x.slice(1, 0, begin) = noise(1);
      return {x, d, c10::str("a run of ", begin)};
    }
    default: {
      auto x = noise(length);
      x.select(1, draw.below(length)) *= 1e4;
      return {x, d, "a spike"};
    }
  }
}

struct Outcome {
  double error = 0;       // of the output, relative to the largest exact one
  double grad_error = 0;  // of gradients, likewise, the worst of the three
  int64_t exact_pairs = 0;
};

double difference(const at::Tensor& a, const at::Tensor& b) {
  const auto wide = b.to(at::kDouble);
  return (a.to(at::kDouble) - wide).abs().max().item<double>() /
         std::max(wide.abs().max().item<double>(), 1e-300);
}

struct Passed {
  at::Tensor out, q, k, v;  // and the gradients
};
template <typename Attend>
Passed pass(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& grad,
            const Attend& attend) {
  const auto leaf = [](const at::Tensor& x) { return x.detach().clone().requires_grad_(); };
  const auto a = leaf(q), b = leaf(k), c = leaf(v);
  const at::Tensor out = attend(a, b, c);
  out.backward(grad);
  return {out.detach(), a.grad(), b.grad(), c.grad()};
}

// Inputs of one trial, and how they are attended.
struct Trial {
  explicit Trial(uint64_t seed_in) : seed(seed_in), draw(seed_in) {
    d = draw.of<int64_t>({16, 32, 64});
    groups = 1 + draw.below(2);
    heads = groups * (1 + draw.below(3));
    length = 40 + draw.below(300);
    const auto near_block = draw.of<int64_t>({16, 24, 64});
    geometry = {near_block, draw.of<int64_t>({0, 1, 4})};
    wide = draw.below(4) == 0;
    q = rows_of_kind(draw, heads, length, d);
    k = rows_of_kind(draw, groups, length, d);
    v = rows_of_kind(draw, groups, length, d);
    if (draw.below(6) == 0) {
      q = {k.x.repeat_interleave(heads / groups, 0), k.rank, "the keys"};
    }
    scale_q = scale();
    scale_k = scale();
    scale_v = scale();
    w_o = at::randn({heads * d, heads * d}, at::kDouble) * scale();
    dead = draw.below(8);
    if (dead == 0) {
      w_o.zero_();
    } else if (dead == 1) {
      w_o.narrow(1, 0, d).zero_();
    }
    const int64_t rank = draw.of<int64_t>({8, d / 2});
    steps = draw.of<int64_t>({-1, 0, 1, 2, 2, 2});
    ranks = {std::min(rank, d - 8), std::min(rank, d - 8),
             draw.below(3) == 0 ? 0.05F : Ranks{}.gate};
    start_kind = draw.below(3);
    if (start_kind > 0) {
      start = at::randn({1, groups, 2, d, d}, at::kFloat);
      if (start_kind == 2) {
        start.narrow(4, 1, d - 1).zero_();
      }
    }
    in_q = input(q, scale_q);
    in_k = input(k, scale_k);
    in_v = input(v, scale_v);
    weights = w_o.to(in_q.scalar_type());
    grad = at::randn(in_q.sizes(), in_q.scalar_type());
  }

  std::string describe() const {
    return c10::str("seed ", seed, ": d ", d, ", heads ", heads, " in ", groups, ", ", length,
                    " tokens in blocks of ", geometry.near_block, ", sinks ", geometry.sink_tokens,
                    ", q ", q.name, " x ", scale_q, ", k ", k.name, " x ", scale_k, ", v ", v.name,
                    " x ", scale_v, ", w_o ",
                    dead == 0   ? "0"
                    : dead == 1 ? "of a dead head"
                                : "sound",
                    wide ? ", double" : ", float", ", rank ", ranks.qk, ", gate ", ranks.gate, ", ",
                    steps, " updates, start ", start_kind, ": ");
  }

  // After W_O, in double.
  at::Tensor projected(const at::Tensor& out) const {
    return at::matmul(out.to(at::kDouble).transpose(1, 2).flatten(2), w_o.t());
  }
  // Bases see all keys, not all queries, and without an update not the values.
  bool few() const { return steps != 0 && k.rank <= ranks.qk && v.rank <= ranks.v; }
  double largest_score() const {
    return longest(in_q) * longest(in_k) / std::sqrt(static_cast<double>(d));
  }
  static double longest(const at::Tensor& x) {
    return at::linalg_vector_norm(x, 2, {3}, false, at::kDouble).max().item<double>();
  }

  uint64_t seed;
  Draw draw;
  int64_t d, groups, heads, length;
  Geometry geometry;
  bool wide;  // the composed path in double, else the CPU's kernels
  Rows q, k, v;
  double scale_q, scale_k, scale_v;
  at::Tensor w_o;
  int64_t dead;  // 0: W_O is zero; 1: that of a head
  Ranks ranks;
  int64_t steps;
  int64_t start_kind;  // none, of a calibration, of a degenerate one
  at::Tensor start;
  at::Tensor in_q, in_k, in_v, weights, grad;

 private:
  double scale() {  // of products of two, within what float32 holds
    return draw.below(3) > 0 ? 1.0
           : wide            ? draw.of({1e-150, 1e-20, 1e8})
                             : draw.of({1e-30, 1e-20, 1e-10, 1e4, 1e8});
  }
  at::Tensor input(const Rows& rows, double by) const {
    return (rows.x * by).to(wide ? at::kDouble : at::kFloat).unsqueeze(0);
  }
};

bool finite(const at::Tensor& x) {
  return at::isfinite(x).all().item<bool>();
}

// Token by token far keys are held at their ranks, and nothing is gated.
at::Tensor token_by_token(Trial& trial, LowRankController& controller) {
  at::NoGradGuard no_grad;
  const auto cache = controller.make_cache(1, trial.length);
  std::vector<at::Tensor> pieces;
  for (int64_t begin = 0, end = 0; begin < trial.length; begin = end) {
    end = std::min(trial.length, begin + 1 + trial.draw.below(trial.length));
    const auto rows = [&](const at::Tensor& x) { return x.slice(2, begin, end); };
    pieces.push_back(controller.extend(0, rows(trial.in_q), rows(trial.in_k), rows(trial.in_v),
                                       trial.weights, *cache));
  }
  return at::cat(pieces, 2);
}

// What is wrong with a trial; "" if nothing is.
std::string judge(Trial& trial, Outcome& outcome) {
  LowRankController controller(std::make_shared<GatedPolicy>(trial.ranks), trial.geometry,
                               {trial.steps, trial.start});
  std::shared_ptr<LayerPlan> plan;
  Passed low, exact, doubled;
  try {
    low = pass(trial.in_q, trial.in_k, trial.in_v, trial.grad,
               [&](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
                 return controller.attend(0, a, b, c, trial.weights, plan);
               });
    exact = pass(trial.in_q, trial.in_k, trial.in_v, trial.grad, &exact_attention);
    const auto to_double = [](const at::Tensor& x) { return x.to(at::kDouble); };
    doubled = pass(to_double(trial.in_q), to_double(trial.in_k), to_double(trial.in_v),
                   to_double(trial.grad), &reference::exact_attention);
  } catch (const std::exception& error) {
    return error.what();
  }
  outcome.exact_pairs = controller.take_statistics().exact_pairs;
  if (!finite(exact.out)) {
    return "";  // nothing is promised
  }
  if (!finite(low.out)) {
    return "the output is not finite";
  }
  const auto wanted = trial.projected(exact.out);
  // Scores of 1e16 have no digits behind the point: no two ways of adding them up agree.
  const double rounding = difference(wanted, trial.projected(doubled.out));
  const double error = difference(trial.projected(low.out), wanted);
  // What attention may give at all, relative to what it gives.
  const double range = (at::linalg_matrix_norm(trial.w_o, 2) * Trial::longest(trial.in_v))
                           .item<double>() /
                       std::max(wanted.abs().max().item<double>(), 1e-300);
  // Grams and bases are of float32: scores may be off by some 1e-6 of the product of their rows'
  // lengths.
  const double largest_score = trial.largest_score();
  const double of_bases = trial.few() ? 5e-3 + 1e-5 * largest_score
                                      : std::numeric_limits<double>::infinity();
  const double allowed = std::min(of_bases, 10 * range) + 10 * rounding;
  if (!(error <= allowed)) {
    return c10::str("the output is ", error, " off, allowed ", allowed, " (rounding ", rounding,
                    ")");
  }
  if (trial.draw.below(4) == 0) {
    const double cached = difference(trial.projected(token_by_token(trial, controller)), wanted);
    if (!(cached <= allowed)) {
      return c10::str("with a cache the output is ", cached, " off, allowed ", allowed,
                      " (rounding ", rounding, ")");
    }
  }
  outcome.error = trial.few() && rounding < 1e-5 && largest_score < 100 ? error : 0;
  for (const auto& [name, mine, its] :
       {std::tuple("q", low.q, exact.q), {"k", low.k, exact.k}, {"v", low.v, exact.v}}) {
    // Beyond 1e6 a log-sum-exp of float32 has no digits for weights.
    if (largest_score < 1e6 && finite(its) && !finite(mine)) {
      return c10::str("the gradient of ", name, " is not finite");
    }
  }
  return "";
}

TEST(Degenerate, LowRankIsFiniteAndNearExact) {
  const int64_t trials = from_environment("DRRL_TRIALS", 400),
                first = from_environment("DRRL_SEED", 0);
  int64_t failures = 0, exact_pairs = 0;
  Outcome worst;
  for (int64_t i = first; i < first + trials; ++i) {
    Trial trial(static_cast<uint64_t>(i));
    Outcome outcome;
    if (const std::string wrong = judge(trial, outcome); !wrong.empty() && ++failures <= 20) {
      ADD_FAILURE() << trial.describe() << wrong;
    }
    worst.error = std::max(worst.error, outcome.error);
    exact_pairs += outcome.exact_pairs;
  }
  std::cout << trials << " trials: " << failures << " failures, largest error " << worst.error
            << " of the exact output's largest entry, " << exact_pairs << " pairs left exact"
            << std::endl;
}

TEST(Degenerate, CalibrationIsFinite) {
  at::manual_seed(1);
  const int64_t d = 16, length = 200;
  for (const double by : {0.0, 1.0, 5.0, 30.0, 1e2, 1e4}) {
    for (const bool one_token : {false, true}) {
      auto q = at::randn({1, 4, length, d}), k = at::randn({1, 2, length, d});
      const auto v = at::randn({1, 2, length, d}), w_o = at::randn({64, 4 * d});
      if (one_token) {
        k = k.narrow(2, 0, 1).repeat({1, 1, length, 1});
      }
      CalibrationController calibration(1, {16, 2}, {4, 8});
      std::shared_ptr<LayerPlan> plan;
      q = (q * by).requires_grad_();
      calibration.attend(0, q, k * by, v, w_o, plan).backward(at::randn({1, 4, length, d}));
      for (const auto& x :
           {calibration.damage(), calibration.gated_damage(),
            calibration.exact_entries() / calibration.entries().view({1, 1, -1, 1, 1})}) {
        EXPECT_TRUE(at::isfinite(x).all().item<bool>()) << "times " << by;
        EXPECT_GE(x.min().item<double>(), 0) << "times " << by;
      }
    }
  }
}

}  // namespace
}  // namespace drrl
