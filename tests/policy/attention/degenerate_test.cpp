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

// A trial; false with the reason in `what` if it failed. Its largest errors go to `worst` if its
// far field is of lower rank than the operator's.
bool trial(uint64_t seed, std::string& what, Outcome& outcome) {
  Draw draw(seed);
  const int64_t d = draw.of<int64_t>({16, 32, 64}), groups = 1 + draw.below(2),
                heads = groups * (1 + draw.below(3)), length = 40 + draw.below(300);
  const Geometry geometry{draw.of<int64_t>({16, 24, 64}), draw.of<int64_t>({0, 1, 4})};
  const bool wide = draw.below(4) == 0;  // the composed path in double, else the CPU's kernels
  Rows q = rows_of_kind(draw, heads, length, d), k = rows_of_kind(draw, groups, length, d),
       v = rows_of_kind(draw, groups, length, d);
  if (draw.below(6) == 0) {
    q = {k.x.repeat_interleave(heads / groups, 0), k.rank, "the keys"};
  }
  const auto scale = [&] {  // of products of two, within what float32 holds
    return draw.below(3) > 0 ? 1.0
           : wide            ? draw.of({1e-150, 1e-20, 1e8})
                             : draw.of({1e-30, 1e-20, 1e-10, 1e4, 1e8});
  };
  const double scale_q = scale(), scale_k = scale(), scale_v = scale();
  auto w_o = at::randn({heads * d, heads * d}, at::kDouble) * scale();
  const int64_t dead = draw.below(8);  // a head, or all of them, without output
  if (dead == 0) {
    w_o.zero_();
  } else if (dead == 1) {
    w_o.narrow(1, 0, d).zero_();
  }
  const int64_t rank = draw.of<int64_t>({8, d / 2}), steps = draw.of<int64_t>({-1, 0, 1, 2, 2, 2});
  const Ranks ranks{std::min(rank, d - 8), std::min(rank, d - 8),
                    draw.below(3) == 0 ? 0.05F : Ranks{}.gate};
  const int64_t start_kind = draw.below(3);  // none, of a calibration, of a degenerate one
  at::Tensor start;
  if (start_kind > 0) {
    start = at::randn({1, groups, 2, d, d}, at::kFloat);
    if (start_kind == 2) {
      start.narrow(4, 1, d - 1).zero_();
    }
  }
  const auto type = wide ? at::kDouble : at::kFloat;
  const auto of = [&](const Rows& rows, double by) { return (rows.x * by).to(type).unsqueeze(0); };
  const auto in_q = of(q, scale_q), in_k = of(k, scale_k), in_v = of(v, scale_v),
             out_weights = w_o.to(type), grad = at::randn(in_q.sizes(), type);
  what = c10::str("seed ", seed, ": d ", d, ", heads ", heads, " in ", groups, ", ", length,
                  " tokens in blocks of ", geometry.near_block, ", sinks ", geometry.sink_tokens,
                  ", q ", q.name, " x ", scale_q, ", k ", k.name, " x ", scale_k, ", v ", v.name,
                  " x ", scale_v, ", w_o ",
                  dead == 0   ? "0"
                  : dead == 1 ? "of a dead head"
                              : "sound",
                  wide ? ", double" : ", float", ", rank ", ranks.qk, ", gate ", ranks.gate, ", ",
                  steps, " updates, start ", start_kind, ": ");

  LowRankController controller(std::make_shared<GatedPolicy>(ranks), geometry, {steps, start});
  std::shared_ptr<LayerPlan> plan;
  Passed low, exact, doubled;
  try {
    low = pass(in_q, in_k, in_v, grad,
               [&](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
                 return controller.attend(0, a, b, c, out_weights, plan);
               });
    exact = pass(in_q, in_k, in_v, grad, &exact_attention);
    const auto to_double = [](const at::Tensor& x) { return x.to(at::kDouble); };
    doubled = pass(to_double(in_q), to_double(in_k), to_double(in_v), to_double(grad),
                   &reference::exact_attention);
  } catch (const std::exception& error) {
    what += error.what();
    return false;
  }
  outcome.exact_pairs = controller.take_statistics().exact_pairs;
  const auto finite = [](const at::Tensor& x) { return at::isfinite(x).all().item<bool>(); };
  const auto of_output = [&](const at::Tensor& out) {
    return at::matmul(out.to(at::kDouble).transpose(1, 2).flatten(2), w_o.t());
  };
  if (!finite(exact.out)) {
    return true;  // nothing is promised
  }
  if (!finite(low.out)) {
    what += "the output is not finite";
    return false;
  }
  // Scores of 1e16 have no digits behind the point: no two ways of adding them up agree.
  const double rounding = difference(of_output(exact.out), of_output(doubled.out));
  const double error = difference(of_output(low.out), of_output(exact.out));
  // Grams and bases are of float32: scores may be off by some 1e-6 of the product of their rows'
  // lengths.
  const auto longest = [](const at::Tensor& x) {
    return at::linalg_vector_norm(x, 2, {3}, false, at::kDouble).max().item<double>();
  };
  const double largest_score = longest(in_q) * longest(in_k) / std::sqrt(static_cast<double>(d));
  // What attention may give at all, relative to what it gives.
  const double range = (at::linalg_matrix_norm(w_o, 2) * longest(in_v)).item<double>() /
                       std::max(of_output(exact.out).abs().max().item<double>(), 1e-300);
  const bool few = steps != 0 && k.rank <= ranks.qk &&
                   v.rank <= ranks.v;  // bases see all keys, not all queries, and without an update
                                       // not the values
  const double allowed = std::min(few ? 5e-3 + 1e-5 * largest_score
                                      : std::numeric_limits<double>::infinity(),
                                  10 * range) +
                         10 * rounding;
  if (!(error <= allowed)) {
    what += c10::str("the output is ", error, " off, allowed ", allowed, " (rounding ", rounding,
                     ")");
    return false;
  }
  if (draw.below(4) ==
      0) {  // token by token far keys are held at their ranks, and nothing is gated
    at::NoGradGuard no_grad;
    const auto cache = controller.make_cache(1, length);
    std::vector<at::Tensor> pieces;
    for (int64_t begin = 0, end = 0; begin < length; begin = end) {
      end = std::min(length, begin + 1 + draw.below(length));
      const auto rows = [&](const at::Tensor& x) { return x.slice(2, begin, end); };
      pieces.push_back(
          controller.extend(0, rows(in_q), rows(in_k), rows(in_v), out_weights, *cache));
    }
    const double cached = difference(of_output(at::cat(pieces, 2)), of_output(exact.out));
    if (!(cached <= allowed)) {
      what += c10::str("with a cache the output is ", cached, " off, allowed ", allowed,
                       " (rounding ", rounding, ")");
      return false;
    }
  }
  outcome.error = few && rounding < 1e-5 && largest_score < 100 ? error : 0;
  for (const auto& [name, mine, its, precise] : {std::tuple("q", low.q, exact.q, doubled.q),
                                                 {"k", low.k, exact.k, doubled.k},
                                                 {"v", low.v, exact.v, doubled.v}}) {
    if (largest_score < 1e6 && finite(its) &&
        !finite(mine)) {  // beyond, a log-sum-exp of float32 has no digits for weights
      what += c10::str("the gradient of ", name, " is not finite");
      return false;
    }
  }
  return true;
}

TEST(Degenerate, LowRankIsFiniteAndNearExact) {
  const int64_t trials = from_environment("DRRL_TRIALS", 400),
                first = from_environment("DRRL_SEED", 0);
  int64_t failures = 0, exact_pairs = 0;
  Outcome worst;
  for (int64_t i = first; i < first + trials; ++i) {
    std::string what;
    Outcome outcome;
    if (!trial(static_cast<uint64_t>(i), what, outcome)) {
      ++failures;
      if (failures <= 20) {
        ADD_FAILURE() << what;
      }
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
