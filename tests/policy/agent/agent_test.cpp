// The learned policy: its network, its training on traces, its decisions in the controller.
#include "policy/agent/agent.h"

#include <cmath>

#include <gtest/gtest.h>

#include "core/error.h"
#include "policy/agent/agent_training.h"
#include "policy/allocation/candidates.h"
#include "policy/attention/layer_plan.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/calibration/calibration_controller.h"
#include "policy/calibration/pair_features.h"
#include "policy/rank_policy.h"
#include "tests/support/error_of.h"
#include "tests/support/temporary.h"

namespace drrl {
namespace {

constexpr int64_t kLayers = 3, kGroups = 2, kHeadDim = 64, kLength = 2048;
const std::vector<int64_t> kRanks = {16, 32, 48};

Calibration calibration(bool with_gates = false) {
  Calibration c;
  c.geometry = {256, 4};
  c.seq_len = kLength;
  c.tokens = 1000;
  c.model = "model";
  c.data = "data";
  c.ranks = kRanks;
  const auto by_rank = at::tensor({8.0, 2.0, 0.5}, at::kDouble) * 1e-4;
  at::manual_seed(3);
  c.damage = by_rank * at::randn({kLayers, kGroups, 2, 3, 1}, at::kDouble)
                           .exp();  // no two alike, or all would change their ranks at one price
  c.bases = at::randn({kLayers, kGroups, 2, kHeadDim, kHeadDim});
  if (with_gates) {
    c.gates = at::tensor({0.002, 0.02}, at::kDouble);
    c.gated_damage = c.damage.unsqueeze(5) * at::tensor({0.05, 0.3}, at::kDouble);
    c.exact_entries = at::tensor({0.02, 0.004}, at::kDouble)
                          .expand({kLayers, kGroups, 3, 4, 2})
                          .clone();
  }
  return c;
}

/// Traces whose damage, or with gates whose entries, are the calibrated ones times e^{+-2}, by the
/// sign of one feature; noise that no state explains comes on top of each draw of damage.
Traces traces(const Calibration& c, int64_t sequences, bool informative) {
  const BlockTree tree(kLength, c.geometry);
  Traces t(sequences, kLayers, kGroups, kLength, c.geometry, kRanks,
           c.gates.defined() ? c.gates : CalibrationController::default_gates());
  t.heads_per_group = 3;
  t.calibration = c.digest();
  at::manual_seed(11);
  t.state = at::randn(t.state.sizes());
  const auto sign = informative ? t.state.select(4, 1).sign()
                                : at::randn(t.state.select(4, 1).sizes()).sign();
  const RankCandidates choices(c, tree, {16, 32, 48, 64},
                               flops_cost_model(tree, c.groups(), 3, c.head_dim(), 2));
  for (int64_t pair = 0; pair < tree.num_pairs(); ++pair) {
    const auto at = static_cast<size_t>(pair);
    const auto of_level = c.damage.select(
        3, choices.level_of[at]);  // [layers, groups, 2, ranks], which all sequences and draws have
    t.damage.select(5, pair).copy_(of_level *
                                   (choices.share_of[at] * static_cast<double>(kLength)));
  }
  const auto factor = (2 * sign).exp() /
                      (informative ? 1
                                   : std::cosh(2));  // [sequences, layers, groups, pairs]; 1 on
                                                     // average, or the mean could be learned, too
  t.damage *= (0.5 * at::randn(t.damage.sizes()) - 0.125).exp();
  if (c.gates.defined()) {
    t.gated_damage = (t.damage.unsqueeze(7) * at::tensor({0.05, 0.3})).contiguous();
    t.exact_entries = (factor.unsqueeze(4).unsqueeze(5) * at::tensor({0.02, 0.004}))
                          .expand({-1, -1, -1, -1, 4, -1})
                          .contiguous();
  } else {
    t.damage *= factor.unsqueeze(1).unsqueeze(4).unsqueeze(6);
  }
  return t;
}

AgentTrainingOptions options() {
  AgentTrainingOptions o;
  o.fit_steps = o.reward_steps = 200;
  o.held_out = o.validation = 4;
  o.budgets = {0.6, 0.8};
  o.buckets = {16, 32, 48, 64};
  return o;
}

std::vector<BudgetReport> trained(RankAgent& agent, bool informative, bool with_gates) {
  const Calibration c = calibration(with_gates);
  const std::vector<Traces> all = {traces(c, 28, informative)};
  AgentTrainingOptions o = options();
  o.with_gates = with_gates;
  return train_agent(agent, c, all, o, [](const std::string&) {});
}

TEST(RankAgent, StartsAsTheCalibrationAndSeesOnlyLayersBelow) {
  RankAgent agent(kLayers, kGroups, kRanks, 2, 1);
  const int64_t features = pair_features(kRanks);
  at::NoGradGuard no_grad;
  at::manual_seed(2);
  auto state = at::randn({5, kLayers, features});
  const auto group = at::tensor({0, 1, 1, 0, 1}, at::kLong);
  const auto outputs = [&](const at::Tensor& of, int64_t first_layer,
                           RankAgent::Memory* memory = nullptr) {
    const RankAgent::Factors logs = agent.forward(of, group, first_layer, memory);
    EXPECT_EQ(logs.damage.sizes(), at::IntArrayRef({5, of.size(1), 2, 3, 3}));
    EXPECT_EQ(logs.entries.sizes(), at::IntArrayRef({5, of.size(1), 4, 2}));
    return at::cat({logs.damage.flatten(2), logs.entries.flatten(2)}, 2);
  };
  EXPECT_EQ(outputs(state, 0).abs().max().item<float>(), 0);
  agent.parameters().back().normal_();  // the head
  const auto whole = outputs(state, 0);
  EXPECT_GT(whole.abs().max().item<float>(), 0.1);
  EXPECT_LE(whole.abs().max().item<double>(), RankAgent::kLimit);
  RankAgent::Memory memory;
  for (int64_t layer = 0; layer < kLayers; ++layer) {  // layer by layer, as it decides
    EXPECT_TRUE(at::allclose(outputs(state.narrow(1, layer, 1), layer, &memory).squeeze(1),
                             whole.select(1, layer), 1e-4, 1e-5));
  }
  state.select(1, 2).add_(1);
  const auto other = outputs(state, 0);
  EXPECT_TRUE(other.narrow(1, 0, 2).equal(whole.narrow(1, 0, 2)));
  EXPECT_FALSE(at::allclose(other.select(1, 2), whole.select(1, 2)));
}

TEST(RankAgent, LearnsWhatTheStateTells) {
  for (const bool with_gates : {false, true}) {
    RankAgent agent(kLayers, kGroups, kRanks, with_gates ? 2 : 0, 1);
    for (const BudgetReport& r : trained(agent, /*informative=*/true, with_gates)) {
      SCOPED_TRACE(::testing::Message() << r.budget << (with_gates ? " with gates" : ""));
      const double dp = mean_damage(r.dp);
      EXPECT_LT(mean_damage(r.agent), 0.9 * dp);
      EXPECT_LT(r.oracle, dp);
      EXPECT_LT(r.bound, r.oracle);
      EXPECT_EQ(r.dp.size(), 4U);
      EXPECT_NEAR(r.agent_cost, r.budget, 0.04);
    }
    EXPECT_EQ(agent.with_gates(), with_gates);
    EXPECT_GT(agent.strength(), 0);
    EXPECT_NE(error_of(ErrorKind::kUsage,
                       [&] {
                         make_rl_policy(calibration(with_gates), agent, 0.6, {16, 32, 48, 64}, 2,
                                        !with_gates);
                       })
                  .find("--gates"),
              std::string::npos);
  }
}

TEST(RankAgent, StaysWithTheCalibrationWhereTheStateTellsNothing) {
  for (const bool with_gates : {false, true}) {
    RankAgent agent(kLayers, kGroups, kRanks, with_gates ? 2 : 0, 1);
    for (const BudgetReport& r : trained(agent, /*informative=*/false, with_gates)) {
      SCOPED_TRACE(::testing::Message() << r.budget << (with_gates ? " with gates" : ""));
      const double ratio = mean_damage(r.agent) / mean_damage(r.dp);
      EXPECT_LT(ratio, 1.1);
      EXPECT_GT(ratio, 0.9) << "nothing was to be learned";
    }
  }
}

TEST(RankAgent, SurvivesItsFile) {
  const auto file = temporary("policy.safetensors");
  const Calibration c = calibration();
  c.save(file);
  EXPECT_NE(
      error_of(ErrorKind::kModel, [&] { RankAgent::load(file, c); }).find("drrl-policy train"),
      std::string::npos);
  RankAgent agent(kLayers, kGroups, kRanks, 0, 7);
  agent.set_prices({0.4, 0.6}, {2, 4});
  agent.save(file, c);
  const Calibration back = Calibration::load(file);
  EXPECT_EQ(back.digest(), c.digest());
  const RankAgent loaded = RankAgent::load(file, back);
  EXPECT_EQ(loaded.digest(), agent.digest());
  EXPECT_DOUBLE_EQ(loaded.price_factor(0.5), 3);
  EXPECT_DOUBLE_EQ(loaded.price_factor(0.1), 2);
  EXPECT_DOUBLE_EQ(loaded.price_factor(0.9), 4);
  agent.set_prices({0.4, 0.6}, {2, std::nan("")});
  EXPECT_NE(error_of(ErrorKind::kModel, [&] { agent.save(file, c); })
                .find("\"agent.price_factors\" is empty or not finite"),
            std::string::npos);
  EXPECT_EQ(RankAgent::load(file, back).digest(), loaded.digest())
      << "the older file is still there";
}

TEST(Traces, SurviveTheirFile) {
  const auto file = temporary("traces.safetensors");
  Traces t = traces(calibration(), 2, true);
  t.tokens.random_(1000);
  t.save(file);
  const Traces back = Traces::load(file);
  for (const auto part : Traces::kMeasured) {
    EXPECT_TRUE((back.*part).equal(t.*part));
  }
  EXPECT_TRUE(back.tokens.equal(t.tokens) && back.gates.equal(t.gates));
  EXPECT_EQ(back.calibration, t.calibration);
  AgentTrainingOptions o = options();
  RankAgent agent(kLayers, kGroups, kRanks, 0, 1);
  EXPECT_NE(
      error_of(ErrorKind::kUsage, [&] { train_agent(agent, calibration(), {back}, o, nullptr); })
          .find("2 sequences"),
      std::string::npos);
  Traces cut = t;
  cut.tokens = cut.tokens.narrow(1, 1, kLength - 1).contiguous();
  EXPECT_NE(error_of(ErrorKind::kModel, [&] { cut.save(file); }).find("\"tokens\" is [2, 2047]"),
            std::string::npos);
  cut = t;
  cut.damage = t.damage.clone().fill_(std::nan(""));
  EXPECT_NE(error_of(ErrorKind::kModel, [&] { cut.save(file); })
                .find("\"damage\" is empty or not finite"),
            std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kModel, [&] { t.first(0).save(file); }).find("is empty"),
            std::string::npos);
  EXPECT_EQ(Traces::load(file).sequences(), 2) << "the older file is still there";
  Calibration other = calibration();
  other.damage *= 2;
  o.held_out = 1;
  o.validation = 0;
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { train_agent(agent, other, {back}, o, nullptr); })
                .find(t.calibration),
            std::string::npos);
}

struct Rig {
  int64_t heads = 6, length = 5 * 256 + 40;
  Calibration c = calibration();
  at::Tensor q, k, v, w_o;

  Rig() {
    at::manual_seed(5);
    const auto mix = at::matmul(at::diag(at::logspace(0, -1.5, kHeadDim)),
                                at::randn({kHeadDim, kHeadDim}));
    const auto rows = [&](int64_t h) {
      return at::matmul(at::randn({1, h, length, kHeadDim}), mix);
    };
    q = rows(heads);
    k = rows(kGroups);
    v = rows(kGroups);
    w_o = at::randn({96, heads * kHeadDim});
  }

  LowRankController controller() const {
    RankAgent agent(kLayers, kGroups, kRanks, 0, 1);
    at::manual_seed(9);
    at::NoGradGuard no_grad;
    agent.parameters().back().normal_();
    return {make_rl_policy(c, agent, 0.7, {16, 32, 48, 64}, 2),
            c.geometry,
            {.update_steps = 2, .start = c.bases}};
  }
};

// With gates, too: until it has learned something it takes what dp takes, but for the last steps
// that use up dp's budget.
TEST(LearnedPolicy, StartsAsDp) {
  Calibration c = calibration(/*with_gates=*/true);
  c.damage *= at::tensor({1.0, 30.0, 4.0}, at::kDouble).view({kLayers, 1, 1, 1, 1}) *
              at::tensor({1.0, 3.0}, at::kDouble).view({1, kGroups, 1, 1, 1});
  c.gated_damage = c.damage.unsqueeze(5) * at::tensor({0.05, 0.3}, at::kDouble);
  const BlockTree tree(8 * 256 + 4, c.geometry);
  for (const bool with_gates : {false, true}) {
    const auto dp = make_dp_policy(c, 0.6, {16, 32, 48, 64}, 2, with_gates);
    RankAgent agent(kLayers, kGroups, kRanks, 2, 1);
    agent.set_strength(0);
    const auto rl = make_rl_policy(c, agent, 0.6, {16, 32, 48, 64}, 2, with_gates);
    int64_t items = 0, different = 0, gated = 0;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      const LayerObservation o{layer, 1, 3 * kGroups, kGroups, 0, kHeadDim, tree, {}, {}};
      const auto a = dp->decide(o), b = rl->decide(o);
      for (size_t i = 0; i < a.size(); ++i) {
        ++items;
        different += a[i] != b[i] ? 1 : 0;
        gated += b[i].gated(kHeadDim) ? 1 : 0;
      }
    }
    EXPECT_LE(different, items / 4);
    EXPECT_EQ(gated > 0, with_gates);
  }
}

TEST(LearnedPolicy, IsStrictlyCausalAndDependsOnTheText) {
  const Rig rig;
  const auto outputs = [&](const at::Tensor& k) {
    LowRankController controller = rig.controller();
    std::vector<at::Tensor> result;
    std::vector<std::vector<Ranks>> ranks;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      std::shared_ptr<LayerPlan> plan;
      result.push_back(controller.attend(layer, rig.q, k, rig.v, rig.w_o, plan));
      ranks.push_back(plan->lowrank->ranks);
    }
    return std::pair(result, ranks);
  };
  const auto [before, ranks] = outputs(rig.k);
  EXPECT_NE(*std::min_element(ranks[1].begin(), ranks[1].end()),
            *std::max_element(ranks[1].begin(), ranks[1].end()));
  for (const int64_t t : {300, 700, 1100}) {
    auto k = rig.k.clone();
    k.narrow(2, t, rig.length - t).mul_(-3).add_(1);
    const auto [after, other_ranks] = outputs(k);
    for (size_t layer = 0; layer < kLayers; ++layer) {
      EXPECT_TRUE(before[layer].narrow(2, 0, t).equal(after[layer].narrow(2, 0, t)))
          << "from token " << t;
    }
    if (t == 300) {
      EXPECT_NE(ranks, other_ranks) << "another text, the same ranks";
    }
  }
}

TEST(LearnedPolicy, DecidesAlikeWhenTokensComeOneByOne) {
  const Rig rig;
  LowRankController whole = rig.controller(), growing = rig.controller();
  const auto cache = growing.make_cache(kLayers, rig.length);
  const std::vector<int64_t> cuts = {0, 700, 1100, rig.length};
  std::vector<at::Tensor> expected;
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    std::shared_ptr<LayerPlan> plan;
    expected.push_back(whole.attend(layer, rig.q, rig.k, rig.v, rig.w_o, plan));
  }
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const auto piece = [&](const at::Tensor& x) {
      return x.narrow(2, cuts[i], cuts[i + 1] - cuts[i]);
    };
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      const auto got = growing.extend(layer, piece(rig.q), piece(rig.k), piece(rig.v), rig.w_o,
                                      *cache);
      EXPECT_LT(
          ((got - piece(expected[static_cast<size_t>(layer)])).norm() / got.norm()).item<double>(),
          1e-4);
    }
  }
}

}  // namespace
}  // namespace drrl
