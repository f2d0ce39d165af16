#include <cmath>
#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "core/attention/exact_attention.h"
#include "core/attention/far_bases.h"
#include "core/attention/flops.h"
#include "core/attention/lowrank_attention.h"
#include "core/error.h"
#include "core/io/safetensors.h"
#include "policy/allocation/allocation.h"
#include "policy/attention/layer_plan.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/calibration/calibration.h"
#include "policy/calibration/calibration_controller.h"
#include "policy/calibration/pair_features.h"
#include "policy/rank_policy.h"
#include "tests/support/error_of.h"
#include "tests/support/temporary.h"

namespace drrl {
namespace {

Calibration make_calibration(int64_t layers, int64_t groups, int64_t levels, int64_t head_dim,
                             std::vector<int64_t> ranks) {
  Calibration c;
  c.geometry = {16, 4};
  c.seq_len = 128;
  c.tokens = 1000;
  c.model = "model";
  c.data = "text";
  c.ranks = std::move(ranks);
  // Layers differ by orders of magnitude, groups and levels less, and values matter less than
  // scores.
  c.damage = at::zeros({layers, groups, 2, levels, static_cast<int64_t>(c.ranks.size())},
                       at::kDouble);
  auto table = c.damage.accessor<double, 5>();
  for (int64_t i = 0; i < layers; ++i) {
    for (int64_t j = 0; j < groups; ++j) {
      for (int64_t level = 0; level < levels; ++level) {
        for (size_t r = 0; r < c.ranks.size(); ++r) {
          const double base = std::pow(10.0, static_cast<double>(i % 3)) *
                              (1.0 + 0.7 * static_cast<double>(j)) *
                              std::exp(-0.1 * static_cast<double>(c.ranks[r]) -
                                       0.5 * static_cast<double>(level));
          table[i][j][0][level][static_cast<int64_t>(r)] = base;
          table[i][j][1][level][static_cast<int64_t>(r)] = 0.3 * base;
        }
      }
    }
  }
  at::manual_seed(9);
  c.bases = at::randn({layers, groups, 2, head_dim, head_dim});
  return c;
}

// Gates that leave a tenth of the damage for one entry in fifty.
void add_gates(Calibration& c) {
  const auto choices = static_cast<int64_t>(c.ranks.size()) + 1;
  c.gates = at::tensor({0.1}, at::kDouble);
  c.gated_damage = (0.1 * c.damage).unsqueeze(5);
  c.exact_entries = at::full({c.layers(), c.groups(), c.levels(), choices, 1}, 0.02, at::kDouble);
}

double damage_of(const Calibration& c, const RankTable& table) {
  double sum = 0;
  for (int64_t layer = 0; layer < table.layers(); ++layer) {
    for (int64_t group = 0; group < table.groups(); ++group) {
      for (int64_t level = 0; level < table.levels(); ++level) {
        for (size_t i = 0; i < c.ranks.size(); ++i) {
          const auto at_rank = [&](int64_t kind) {
            return c
                .damage[layer][group][kind][std::min(level, c.levels() - 1)]
                       [static_cast<int64_t>(i)]
                .item<double>();
          };
          sum += table.at(layer, group, level).qk == c.ranks[i] ? at_rank(0) : 0;
          sum += table.at(layer, group, level).v == c.ranks[i] ? at_rank(1) : 0;
        }
      }
    }
  }
  return sum;
}

constexpr int64_t kSteps = 2;

// Operations of a table over those of exact attention, as the operator's own accounting sees them.
double operations_of(const RankTable& table, const BlockTree& tree, int64_t heads_per_group,
                     int64_t d) {
  const int64_t heads = table.groups() * heads_per_group;
  double sum = 0;
  for (int64_t layer = 0; layer < table.layers(); ++layer) {
    AttentionFlops flops = exact_part_flops(tree, 1, heads, table.groups(), d, false);
    flops.bases += output_gram_flops(heads * d, heads, d);
    for (int64_t group = 0; group < table.groups(); ++group) {
      for (const PairRun& run : tree.runs()) {
        const Ranks r = table.at(layer, group, run.level);
        for (int64_t i = 0; i < run.count; ++i) {
          flops += far_pair_flops(run, FarKind::kScores, r.qk, heads_per_group, d, false);
          flops += far_pair_flops(run, FarKind::kValues, r.v, heads_per_group, d, false);
          flops.bases += r.qk < d
                             ? basis_update_flops(d, r.qk, kSteps) + residual_factor_flops(d, r.qk)
                             : 0;
          flops.bases += r.v < d ? basis_update_flops(d, r.v, kSteps) : 0;
        }
      }
    }
    sum += flops.total();
  }
  return sum / (static_cast<double>(table.layers()) *
                exact_attention_flops(1, heads, tree.sequence_length(), d, false));
}

TEST(RankBuckets, ComeFromTheDevice) {
  EXPECT_EQ(rank_buckets(at::kCPU, 64), (std::vector<int64_t>{16, 32, 48, 64}));
  EXPECT_EQ(rank_buckets(at::Device(at::kCUDA, 0), 128), (std::vector<int64_t>{32, 64, 96, 128}));
  EXPECT_EQ(rank_buckets(at::kCPU, 16), (std::vector<int64_t>{4, 8, 12, 16}));
}

// Against exhaustive search. What the relaxation may miss is less than its last step, so that a
// budget one step smaller is a lower bound.
TEST(Allocation, IsTheBestOfAllAllocationsUpToOneStep) {
  const Calibration c = make_calibration(3, 1, 1, 64, {16, 32, 48});
  const std::vector<int64_t> buckets{16, 32, 48, 64};
  const BlockTree tree(4100, {2048, 4});
  ASSERT_EQ(tree.num_levels(), 1);
  std::vector<std::pair<double, double>> all;  // operations and damage of every allocation
  for (int code = 0; code < 4096; ++code) {
    RankTable candidate(3, 1, 1, {64, 64});
    for (int layer = 0; layer < 3; ++layer) {
      candidate.at(layer, 0, 0) = {buckets[code >> (4 * layer) & 3],
                                   buckets[code >> (4 * layer + 2) & 3]};
    }
    all.emplace_back(operations_of(candidate, tree, 3, 64), damage_of(c, candidate));
  }
  const double step = 0.03;  // 16 columns of one kind of one layer: half the tokens' square, a
                             // sixth of the kinds, a quarter of the width
  for (const double budget : {0.7, 0.75, 0.8, 0.85, 0.9, 0.95}) {
    const RankTable chosen = allocate(c, tree,
                                      {.budget = budget,
                                       .heads_per_group = 3,
                                       .buckets = buckets,
                                       .update_steps = kSteps})
                                 .table;
    EXPECT_LE(operations_of(chosen, tree, 3, 64), budget + 1e-9);
    double bound = 1e300;
    for (const auto& [operations, damage] : all) {
      bound = operations <= budget - step ? std::min(bound, damage) : bound;
    }
    ASSERT_LT(bound, 1e300);
    EXPECT_LE(damage_of(c, chosen), bound + 1e-12) << "budget " << budget;
  }
}

TEST(Allocation, SpendsTheBudgetWhereItHelps) {
  const Calibration c = make_calibration(3, 2, 3, 64, {16, 32, 48});
  const std::vector<int64_t> buckets{16, 32, 48, 64};
  const BlockTree tree(8196, {256, 4});  // two levels more than were calibrated
  double last = 1e300;
  for (const double budget : {0.35, 0.4, 0.5, 0.6, 0.7, 0.8}) {
    const RankTable chosen = allocate(c, tree,
                                      {.budget = budget,
                                       .heads_per_group = 3,
                                       .buckets = buckets,
                                       .update_steps = kSteps})
                                 .table;
    const double spent = operations_of(chosen, tree, 3, 64);
    EXPECT_LE(spent, budget + 1e-9);
    EXPECT_GT(spent, budget - 0.01);
    EXPECT_LT(damage_of(c, chosen), last);
    last = damage_of(c, chosen);
  }
  const RankTable exact = allocate(c, tree,
                                   {.budget = 1.0,
                                    .heads_per_group = 3,
                                    .buckets = buckets,
                                    .update_steps = kSteps})
                              .table;
  EXPECT_EQ(exact.at(0, 0, 0), (Ranks{64, 64}));
}

TEST(Allocation, BaselinesKeepTheBudgetAndAreWorse) {
  const Calibration c = make_calibration(4, 2, 3, 64, {16, 32, 48});
  const BlockTree tree(2048, {256, 4});
  const std::vector<int64_t> buckets = {16, 32, 48, 64};
  for (const double budget : {0.6, 0.8}) {
    const auto table = [&](AllocationMethod how, uint64_t seed) {
      return allocate(c, tree,
                      {.budget = budget,
                       .heads_per_group = 3,
                       .buckets = buckets,
                       .method = how,
                       .seed = seed})
          .table;
    };
    const RankTable best = table(AllocationMethod::kOptimal, 0),
                    greedy = table(AllocationMethod::kGreedy, 0),
                    random = table(AllocationMethod::kRandom, 1),
                    other = table(AllocationMethod::kRandom, 2);
    for (const RankTable* t : {&greedy, &random, &other}) {
      EXPECT_LE(operations_of(*t, tree, 3, 64), budget + 1e-9);
    }
    EXPECT_LE(damage_of(c, best), damage_of(c, greedy) * 1.02);
    EXPECT_LT(damage_of(c, greedy), damage_of(c, random));
    EXPECT_NE(damage_of(c, other), damage_of(c, random));
    EXPECT_EQ(damage_of(c, table(AllocationMethod::kRandom, 1)), damage_of(c, random));
  }
}

TEST(Allocation, TakesGatesWhereTheyAreCheaperThanRanks) {
  Calibration c = make_calibration(4, 2, 3, 64, {16, 32, 48});
  const BlockTree tree(2048, {256, 4});
  const std::vector<int64_t> buckets = {16, 32, 48, 64};
  EXPECT_NE(
      error_of(ErrorKind::kUsage,
               [&] {
                 allocate(
                     c, tree,
                     {.budget = 0.6, .heads_per_group = 3, .buckets = buckets, .with_gates = true});
               })
          .find("no gates"),
      std::string::npos);
  add_gates(c);
  const RankTable plain = allocate(c, tree,
                                   {.budget = 0.6,
                                    .heads_per_group = 3,
                                    .buckets = buckets,
                                    .update_steps = 2})
                              .table;
  const RankTable gated = allocate(c, tree,
                                   {.budget = 0.6,
                                    .heads_per_group = 3,
                                    .buckets = buckets,
                                    .with_gates = true})
                              .table;
  const auto count = [&](const RankTable& table, auto&& is) {
    int64_t n = 0;
    for (int64_t i = 0; i < 4 * 2 * tree.num_levels(); ++i) {
      n += is(table.at(i / (2 * tree.num_levels()), i / tree.num_levels() % 2,
                       i % tree.num_levels()))
               ? 1
               : 0;
    }
    return n;
  };
  const auto is_gated = [](const Ranks& r) { return r.gated(64); };
  EXPECT_EQ(count(plain, is_gated), 0);
  EXPECT_GT(count(gated, is_gated), 0);
  EXPECT_EQ(count(gated, [](const Ranks& r) { return r.gate == 0.1F && r.qk == 64 && r.v == 64; }),
            0);  // nothing to make exact
  // Expected damage and operations, with what the gates leave and what exact entries take.
  double damage = 0, exact = 0;
  for (int64_t layer = 0; layer < 4; ++layer) {
    for (int64_t group = 0; group < 2; ++group) {
      for (const PairRun& run : tree.runs()) {
        const Ranks& r = gated.at(layer, group, run.level);
        RankTable one(4, 2, tree.num_levels(), {64, 64});
        one.at(layer, group, run.level) = r;
        damage += run.first_pair == tree.pair_index(run.level, 0)
                      ? damage_of(c, one) * (r.gated(64) ? 0.1 : 1)
                      : 0;
        exact += r.gated(64)
                     ? 0.02 * static_cast<double>(3 * run.count * run.query_rows * run.key_rows) *
                           exact_entry_flops(64, false)
                     : 0;
      }
    }
  }
  EXPECT_LT(damage, 0.5 * damage_of(c, plain));
  EXPECT_LE(operations_of(gated, tree, 3, 64) +
                8 * exact / (4 * exact_attention_flops(1, 6, 2048, 64, false)),
            0.6 + 1e-9);
}

TEST(Allocation, RefusesWhatDoesNotFit) {
  const Calibration c = make_calibration(3, 1, 1, 64, {16, 32, 48});
  const std::vector<int64_t> buckets{16, 32, 48, 64};
  const BlockTree tree(2052, {256, 4});
  EXPECT_NE(
      error_of(
          ErrorKind::kUsage,
          [&] {
            allocate(
                c, tree,
                {.budget = 0.2, .heads_per_group = 3, .buckets = buckets, .update_steps = kSteps});
          })
          .find("0.2"),
      std::string::npos);
  EXPECT_NE(
      error_of(
          ErrorKind::kUsage,
          [&] {
            allocate(
                c, tree,
                {.budget = 1.5, .heads_per_group = 3, .buckets = buckets, .update_steps = kSteps});
          })
          .find("1.5"),
      std::string::npos);
  const auto policy = make_dp_policy(c, 0.8, buckets, kSteps);
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { policy->decide({3, 1, 3, 1, 0, 64, tree, {}, {}}); })
                .find("3 layers"),
            std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { policy->decide({0, 1, 3, 1, 0, 128, tree, {}, {}}); })
                .find("128"),
            std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { policy->decide({0, 1, 3, 1, 1, 64, tree, {}, {}}); })
                .find("1 KV groups"),
            std::string::npos);
}

TEST(Calibration, SurvivesItsFile) {
  const Calibration c = make_calibration(4, 2, 3, 64, {16, 48});
  c.save(temporary("ranks.safetensors"));
  const Calibration back = Calibration::load(temporary("ranks.safetensors"));
  EXPECT_EQ(back.ranks, c.ranks);
  EXPECT_TRUE(back.damage.equal(c.damage));
  EXPECT_TRUE(back.bases.equal(c.bases));
  EXPECT_EQ(back.geometry, c.geometry);
  EXPECT_EQ(back.tokens, c.tokens);
  EXPECT_EQ(back.digest(), c.digest());
  EXPECT_FALSE(back.gates.defined());
  Calibration gated = c;
  add_gates(gated);
  EXPECT_NE(gated.digest(), c.digest());
  gated.save(temporary("gated.safetensors"));
  const Calibration read = Calibration::load(temporary("gated.safetensors"));
  EXPECT_TRUE(read.gates.equal(gated.gates) && read.gated_damage.equal(gated.gated_damage) &&
              read.exact_entries.equal(gated.exact_entries));
  EXPECT_EQ(read.digest(), gated.digest());
}

TEST(Calibration, NamesWhatIsWrongWithAFile) {
  const auto file = temporary("bad.safetensors");
  EXPECT_NE(error_of(ErrorKind::kModel, [&] { Calibration::load(temporary("none.safetensors")); })
                .find("none.safetensors"),
            std::string::npos);
  const auto expect = [&](const std::string& part) {
    const std::string message = error_of(ErrorKind::kModel, [&] { Calibration::load(file); });
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_NE(message.find("bad.safetensors"), std::string::npos) << message;
  };
  std::ofstream(file) << "{}";
  expect("bytes");
  write_safetensors(file, {{"x", at::zeros({1})}});
  expect("make the calibration again");
  const auto with = [&](auto&& change) {
    Calibration c = make_calibration(2, 1, 2, 64, {16, 32});
    change(c);
    const auto unwritten = temporary("unwritten.safetensors");
    const std::string message = error_of(ErrorKind::kModel, [&] { c.save(unwritten); });
    EXPECT_NE(message.find("unwritten.safetensors\" was not written"), std::string::npos)
        << message;
    EXPECT_FALSE(std::filesystem::exists(unwritten));
    write_safetensors(file, c.tensors(), c.metadata());
  };
  with([](Calibration& c) { c.bases = c.bases.narrow(3, 0, 32).narrow(4, 0, 32).contiguous(); });
  expect("ranks");
  with([](Calibration& c) { c.ranks = {32, 16}; });
  expect("\"ranks\"");
  with([](Calibration& c) { c.damage[0][0][0][0][0] = -1.0; });
  expect("negative");
  with([](Calibration& c) { c.damage[1][0][1][0][0] = std::nan(""); });
  expect("not finite");
  with([](Calibration& c) {
    add_gates(c), c.exact_entries = c.exact_entries.narrow(3, 0, 1).contiguous();
  });
  expect("gates");
  with([](Calibration& c) { add_gates(c), c.exact_entries.fill_(1.5); });
  expect("exact_entries");
}

struct Rig {
  int64_t heads = 6, groups = 3, length = 200, d = 32;
  Geometry geometry{32, 4};
  at::Tensor q, k, v, w_o;

  Rig() {
    at::manual_seed(5);
    const auto mix = at::matmul(at::diag(at::logspace(0, -1.5, d)), at::randn({d, d}));
    q = at::matmul(at::randn({1, heads, length, d}), mix);
    k = at::matmul(at::randn({1, groups, length, d}), mix);
    v = at::matmul(at::randn({1, groups, length, d}), mix);
    w_o = at::randn({64, heads * d});
  }

  std::vector<std::shared_ptr<RankPolicy>> policies() const {
    return {make_exact_policy(), make_fixed_policy(8, d),
            make_energy_policy(0.9, rank_buckets(at::kCPU, d)),
            make_table_policy(unequal_ranks(), "table")};
  }

  // Each policy with every way to make bases.
  std::vector<std::pair<std::shared_ptr<RankPolicy>, BasisOptions>> settings() const {
    std::vector<std::pair<std::shared_ptr<RankPolicy>, BasisOptions>> all;
    at::manual_seed(6);
    for (const auto& policy : policies()) {
      for (const int64_t steps : {BasisOptions::kSolve, int64_t{0}, int64_t{2}}) {
        all.emplace_back(policy, BasisOptions{steps, {}});
      }
      all.emplace_back(policy, BasisOptions{1, at::randn({2, groups, 2, d, d})});
    }
    return all;
  }

  // Every layer, group and level its own ranks, exact ones among them.
  static RankTable unequal_ranks() {
    RankTable table(2, 3, 3, {8, 8});
    const Ranks choices[] = {{8, 16}, {16, 16}, {32, 8}, {16, 32}, {32, 32}};
    for (int64_t i = 0; i < 18; ++i) {
      table.at(i / 9, i / 3 % 3, i % 3) = choices[i % 5];
    }
    return table;
  }
};

TEST(Controller, FullPolicyIsExactAttention) {
  const Rig rig;
  LowRankController controller(make_exact_policy(), rig.geometry);
  std::shared_ptr<LayerPlan> plan;
  EXPECT_TRUE(at::equal(controller.attend(0, rig.q, rig.k, rig.v, rig.w_o, plan),
                        exact_attention(rig.q, rig.k, rig.v)));
  const AttentionStatistics s = controller.take_statistics();
  EXPECT_EQ(s.flops, s.exact_flops);
  EXPECT_EQ(s.decompositions, 0);
  EXPECT_EQ(s.rank_qk / static_cast<double>(s.decisions), 32);
}

TEST(Controller, EveryPolicyIsStrictlyCausal) {
  const Rig rig;
  for (const auto& [policy, bases] : rig.settings()) {
    LowRankController controller(policy, rig.geometry, bases);
    SCOPED_TRACE(controller.describe());
    std::shared_ptr<LayerPlan> plan;
    const auto before = controller.attend(0, rig.q, rig.k, rig.v, rig.w_o, plan);
    for (const int64_t t : {3, 40, 99, 164, 199}) {
      const auto changed = [&](const at::Tensor& x) {
        auto copy = x.clone();
        copy.narrow(2, t, rig.length - t).mul_(-2.0).add_(0.5);
        return copy;
      };
      plan.reset();
      const auto after = controller.attend(0, changed(rig.q), changed(rig.k), changed(rig.v),
                                           rig.w_o, plan);
      EXPECT_TRUE(at::equal(before.narrow(2, 0, t), after.narrow(2, 0, t))) << "from token " << t;
      EXPECT_FALSE(at::equal(before.narrow(2, t, 1), after.narrow(2, t, 1)));
    }
  }
}

TEST(Controller, ReplaysAPlanBitForBitAndCountsItOnce) {
  const Rig rig;
  for (const auto& [policy, bases] : rig.settings()) {
    LowRankController controller(policy, rig.geometry, bases);
    std::shared_ptr<LayerPlan> plan;
    const auto first = controller.attend(1, rig.q, rig.k, rig.v, rig.w_o, plan);
    ASSERT_NE(plan, nullptr);
    const AttentionStatistics s = controller.take_statistics();
    EXPECT_EQ(s.calls, 1);
    EXPECT_TRUE(at::equal(first, controller.attend(1, rig.q, rig.k, rig.v, rig.w_o, plan)));
    EXPECT_EQ(controller.take_statistics().calls, 0);
  }
}

TEST(Controller, EnergyKeepsWhatItPromises) {
  const Rig rig;
  const BlockTree tree(rig.length, rig.geometry);
  const FarBases bases = solve_far_bases(far_grams(rig.q, rig.k, rig.v, tree), rig.w_o, true, true);
  const auto energy = bases.scores.singular_values.pow(2);
  for (const double keep : {0.5, 0.9, 0.999}) {
    LowRankController controller(make_energy_policy(keep, rank_buckets(at::kCPU, rig.d)),
                                 rig.geometry);
    std::shared_ptr<LayerPlan> plan;
    controller.attend(0, rig.q, rig.k, rig.v, rig.w_o, plan);
    for (int64_t i = 0; i < energy.size(0); ++i) {
      const int64_t rank = plan->lowrank == nullptr
                               ? rig.d
                               : plan->lowrank->ranks[static_cast<size_t>(i)].qk;
      const double kept = (energy[i].narrow(0, 0, rank).sum() / energy[i].sum()).item<double>();
      EXPECT_GE(kept, keep - 1e-9);
      if (rank > 8) {
        EXPECT_LT((energy[i].narrow(0, 0, rank - 8).sum() / energy[i].sum()).item<double>(), keep)
            << "a smaller bucket would do";
      }
    }
  }
}

TEST(Controller, TheGuardRaisesRanksUntilTheirCertificateHolds) {
  const Rig rig;
  const BlockTree tree(rig.length, rig.geometry);
  const PairGrams grams = far_grams(rig.q, rig.k, rig.v, tree);
  const BasisOptions bases{1, first_pair_bases(grams, rig.w_o).unsqueeze(0)};  // of one layer
  const auto run = [&](double eps, const at::Tensor& k) {
    LowRankController controller(make_fixed_policy(8, rig.d), rig.geometry, bases, 0,
                                 {eps, rank_buckets(at::kCPU, rig.d)});
    std::shared_ptr<LayerPlan> plan;
    const auto out = controller.attend(0, rig.q, k, rig.v, rig.w_o, plan);
    return std::tuple(out, plan->lowrank, controller.take_statistics().guard_raises);
  };
  const auto [free, free_plan, none] = run(0, rig.k);
  const auto [loose, loose_plan, no_raises] = run(2, rig.k);
  EXPECT_TRUE(loose.equal(free));
  EXPECT_EQ(no_raises, 0);
  constexpr double kEps = 0.2;
  const auto [out, plan, raises] = run(kEps, rig.k);
  const StartLoss loss = start_loss(grams, rig.w_o, bases.start[0]);
  int64_t raised = 0, low = 0;
  for (size_t i = 0; i < plan->ranks.size(); ++i) {
    for (const auto& [of_kind, rank] :
         {std::pair(loss.scores, plan->ranks[i].qk), std::pair(loss.values, plan->ranks[i].v)}) {
      const auto norm = [&](int64_t r) {
        return std::sqrt((of_kind[static_cast<int64_t>(i)][r] / of_kind[static_cast<int64_t>(i)][0])
                             .item<double>());
      };
      EXPECT_LE(norm(rank), kEps);
      if (rank > 8) {
        EXPECT_GT(norm(rank - 8), kEps) << "a smaller bucket would do";
      }
      raised += rank > 8 ? 1 : 0;
      low += rank < rig.d ? 1 : 0;
    }
  }
  EXPECT_EQ(raises, raised);
  EXPECT_GT(raised, 0);
  EXPECT_GT(low, 0);
  auto k = rig.k.clone();
  k.narrow(2, 99, rig.length - 99).mul_(-2.0);
  EXPECT_TRUE(std::get<0>(run(kEps, k)).narrow(2, 0, 99).equal(out.narrow(2, 0, 99)));
}

TEST(Controller, ItsDigestTellsDecisionsApart) {
  const Rig rig;
  RankTable table = Rig::unequal_ranks();
  const auto digest = [&](const RankTable& ranks, const std::vector<int64_t>& layers) {
    LowRankController controller(make_table_policy(ranks, "table"), rig.geometry);
    for (const int64_t layer : layers) {
      std::shared_ptr<LayerPlan> plan;
      controller.attend(layer, rig.q, rig.k, rig.v, rig.w_o, plan);
    }
    const uint64_t taken = controller.take_decisions_digest();
    EXPECT_EQ(
        controller.take_decisions_digest(),
        LowRankController(make_table_policy(ranks, "table"), rig.geometry).take_decisions_digest());
    return taken;
  };
  const uint64_t both = digest(table, {0, 1});
  EXPECT_EQ(digest(table, {0, 1}), both);
  EXPECT_NE(digest(table, {1, 0}), both);
  EXPECT_NE(digest(table, {0}), both);
  table.at(1, 2, 0).v = 24;  // the table's description stays
  EXPECT_EQ(digest(table, {0}), digest(Rig::unequal_ranks(), {0}));
  EXPECT_NE(digest(table, {0, 1}), both);
}

TEST(Controller, RefusesTensorsThatDisagree) {
  const Rig rig;
  LowRankController controller(make_fixed_policy(8, rig.d), rig.geometry,
                               {2, at::randn({2, rig.groups, 2, rig.d, rig.d})});
  const auto refused = [&](int64_t layer, const at::Tensor& q, const at::Tensor& k,
                           const at::Tensor& v, const at::Tensor& w_o) {
    std::shared_ptr<LayerPlan> plan;
    EXPECT_THROW(controller.attend(layer, q, k, v, w_o, plan), c10::Error);
  };
  refused(2, rig.q, rig.k, rig.v, rig.w_o);
  refused(0, rig.q, rig.k.narrow(1, 0, 2), rig.v.narrow(1, 0, 2), rig.w_o);
  refused(0, rig.q, rig.k.narrow(2, 0, 100), rig.v.narrow(2, 0, 100), rig.w_o);
  refused(0, rig.q, rig.k, rig.v.narrow(3, 0, 16), rig.w_o);
  refused(0, rig.q, rig.k, rig.v, rig.w_o.t());
  refused(0, rig.q[0], rig.k, rig.v, rig.w_o);
}

TEST(Controller, AShortSequenceIsExact) {
  const Rig rig;
  LowRankController controller(make_fixed_policy(8, rig.d), rig.geometry);
  std::shared_ptr<LayerPlan> plan;
  const auto cut = [](const at::Tensor& x) { return x.narrow(2, 0, 36); };
  EXPECT_TRUE(at::equal(controller.attend(0, cut(rig.q), cut(rig.k), cut(rig.v), rig.w_o, plan),
                        exact_attention(cut(rig.q), cut(rig.k), cut(rig.v))));
}

TEST(Policies, RefuseSenselessSettings) {
  EXPECT_NE(error_of(ErrorKind::kUsage, [] { make_fixed_policy(65, 64); }).find("65"),
            std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kUsage, [] { make_fixed_policy(0, 64); }).find("0"),
            std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kUsage, [] { make_energy_policy(1.5, {16}); }).find("1.5"),
            std::string::npos);
}

// Lets the controller measure one layer; returns the gradient of that layer's output.
at::Tensor measure(const Rig& rig, CalibrationController& controller, int64_t layer) {
  const auto q = rig.q.clone().requires_grad_(true);
  const auto g = at::randn({1, rig.heads, rig.length, rig.d});
  std::shared_ptr<LayerPlan> plan;
  torch::autograd::backward({(controller.attend(layer, q, rig.k, rig.v, rig.w_o, plan) * g).sum()});
  return g;
}

// A two-layer toy whose "log-likelihood" is linear in the attention outputs, so that 1/2 (g . D)^2
// per position can be computed by hand.
TEST(CalibrationController, MeasuresHalfTheSquaredMovementOfEachPosition) {
  const Rig rig;
  CalibrationController controller(2, rig.geometry, {8, 16});
  const at::Tensor g = measure(rig, controller, 1);
  const BlockTree tree(rig.length, rig.geometry);
  const PairGrams grams = far_grams(rig.q, rig.k, rig.v, tree);
  FarBases bases = solve_far_bases(grams, rig.w_o, true, true);
  ASSERT_EQ(controller.damage().sizes(), at::IntArrayRef({2, rig.groups, 2, tree.num_levels(), 2}));
  for (int kind = 0; kind < 2; ++kind) {
    for (int64_t level = 0; level < tree.num_levels(); ++level) {
      RankTable table(1, rig.groups, tree.num_levels(), {rig.d, rig.d});
      for (int64_t group = 0; group < rig.groups; ++group) {
        (kind == 0 ? table.at(0, group, level).qk : table.at(0, group, level).v) = 16;
      }
      auto ranks = make_table_policy(table, "one level")
                       ->decide({0, 1, rig.heads, rig.groups, 0, rig.d, tree, {}, {}});
      const auto error = lowrank_attention(rig.q, rig.k, rig.v,
                                           make_plan(tree, std::move(ranks), grams, bases)) -
                         exact_attention(rig.q, rig.k, rig.v);
      const auto expected = 0.5 * (error * g)
                                      .unflatten(1, {rig.groups, -1})
                                      .sum(at::IntArrayRef{2, 4})
                                      .pow(2)
                                      .sum(at::IntArrayRef{0, 2});  // [G]
      const auto got = controller.damage()[1].select(1, kind).select(1, level).select(1, 1);
      EXPECT_TRUE(at::allclose(got, expected.to(at::kDouble), 1e-3)) << got << expected;
      EXPECT_TRUE((got > 0).all().item<bool>());
    }
  }
  EXPECT_EQ(controller.damage()[0].abs().sum().item<double>(), 0);
}

// What a gate leaves is the damage of the operator with that gate, and the entries that it makes
// exact there are those counted.
TEST(CalibrationController, MeasuresGates) {
  const Rig rig;
  CalibrationController controller(1, rig.geometry, {8, 16});
  const at::Tensor g = measure(rig, controller, 0);
  const BlockTree tree(rig.length, rig.geometry);
  const PairGrams grams = far_grams(rig.q, rig.k, rig.v, tree);
  FarBases bases = solve_far_bases(grams, rig.w_o, true, true);
  const auto shares = controller.exact_entries() /
                      controller.entries().view({1, 1, tree.num_levels(), 1, 1});
  int64_t partly = 0;
  for (int64_t level = 0; level < tree.num_levels(); ++level) {
    for (int64_t kind = 0; kind < 2; ++kind) {
      for (int64_t gate = 0; gate < controller.default_gates().size(0); ++gate) {
        RankTable table(1, rig.groups, tree.num_levels(), {rig.d, rig.d});
        for (int64_t group = 0; group < rig.groups; ++group) {
          table.at(0, group, level) = {
              kind == 0 ? 8 : rig.d, kind == 0 ? rig.d : 8,
              controller.default_gates()[gate].to(at::kFloat).item<float>()};
        }
        const auto low = make_plan(
            tree,
            make_table_policy(table, "one level")
                ->decide({0, 1, rig.heads, rig.groups, 0, rig.d, tree, {}, {}}),
            grams, bases);
        FarServed made;
        const auto error = lowrank_attention(rig.q, rig.k, rig.v, low, &made) -
                           exact_attention(rig.q, rig.k, rig.v);
        const auto expected = 0.5 * (error * g)
                                        .unflatten(1, {rig.groups, -1})
                                        .sum(at::IntArrayRef{2, 4})
                                        .pow(2)
                                        .sum(at::IntArrayRef{0, 2});  // [G]
        const auto
            got = controller.gated_damage()[0].select(1, kind).select(1, level).select(1, 0).select(
                1, gate);
        const auto ungated = controller.damage()[0].select(1, kind).select(1, level).select(
            1, 0);  // little is left of it at the lowest gate
        EXPECT_TRUE(((got - expected).abs() <= 1e-3 * expected + 1e-5 * ungated).all().item<bool>())
            << got << expected << ungated;
        const int64_t heads = rig.heads / rig.groups;
        for (int64_t group = 0; group < rig.groups; ++group) {
          const int64_t exact = made.exact.count(group * heads * rig.length, heads * rig.length, 0,
                                                 rig.length);
          const double share = shares[0][group][level][kind == 0 ? 0 : 2][gate].item<double>();
          EXPECT_NEAR(share,
                      static_cast<double>(exact) / static_cast<double>(heads) /
                          controller.entries()[0][level].item<double>(),
                      1e-12);
          partly += share > 0 && share < 1 ? 1 : 0;
        }
      }
    }
  }
  EXPECT_GT(partly, 0);
}

TEST(FarBases, UpdatesComeCloseToSolutions) {
  const Rig rig;
  const BlockTree tree(rig.length, rig.geometry);
  const auto exact = exact_attention(rig.q, rig.k, rig.v);
  const int64_t items = rig.groups * tree.num_pairs();
  const std::vector<Ranks> ranks(static_cast<size_t>(items), Ranks{16, 16});
  const PairGrams grams = far_grams(rig.q, rig.k, rig.v, tree);
  const auto error_of_bases = [&](FarBases bases) {
    return (lowrank_attention(rig.q, rig.k, rig.v, make_plan(tree, ranks, grams, bases)) - exact)
               .norm()
               .item<double>() /
           exact.norm().item<double>();
  };
  const FarBases solved = solve_far_bases(grams, rig.w_o, true, true);
  EXPECT_EQ(solved.decompositions, 2 * items);
  const double best = error_of_bases(solved);
  at::manual_seed(3);
  const auto noise = at::randn({rig.groups, 2, rig.d, rig.d});
  const FarBases from_noise = update_far_bases(grams, rig.w_o, ranks, noise, 0);
  EXPECT_EQ(from_noise.decompositions, 0);
  EXPECT_GT(error_of_bases(from_noise), 1.3 * best) << "a random start must leave something to do";
  EXPECT_LT(error_of_bases(update_far_bases(grams, rig.w_o, ranks, noise, 8)), 1.1 * best);
  const FarBases from_first = update_far_bases(grams, rig.w_o, ranks,
                                               first_pair_bases(grams, rig.w_o), 2);
  EXPECT_EQ(from_first.updates, 2 * 2 * items);
  EXPECT_LT(error_of_bases(from_first), 1.1 * best);
}

}  // namespace
}  // namespace drrl
