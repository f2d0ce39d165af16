// What is measured while a model is trained, and what the central trainer learns from it.
#include <set>

#include <gtest/gtest.h>

#include "core/attention/exact_attention.h"
#include "core/attention/far_bases.h"
#include "core/error.h"
#include "policy/allocation/allocation.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/calibration/calibration_controller.h"
#include "policy/calibration/damage_sampler.h"
#include "policy/online/online_trainer.h"
#include "tests/support/error_of.h"

namespace drrl {
namespace {

constexpr int64_t kHeadDim = 16, kLength = 9 * 32 + 2;
const std::vector<int64_t> kRanks = {4, 8, 12};

/// Of two layers with two KV groups; levels as a sequence of kLength tokens has them.
Calibration calibration() {
  Calibration c;
  c.geometry = {32, 2};
  c.seq_len = kLength;
  c.tokens = 1000;
  c.ranks = kRanks;
  at::manual_seed(3);
  c.damage = at::tensor({8.0, 2.0, 0.5}, at::kDouble).expand({2, 2, 2, 4, 3}) *
             (1 + at::rand({2, 2, 2, 4, 1}, at::kDouble)) * 1e-4;
  c.bases = std::get<0>(at::linalg_qr(at::randn({2, 2, 2, kHeadDim, kHeadDim})));
  return c;
}

DamageSampler::Options sampling(int64_t rows, int64_t update_steps = 2) {
  return {.rows = rows,
          .seed = 5,
          .gradient_scale = 1,
          .update_steps = update_steps,
          .buckets = {4, 8, 12, 16}};
}

struct Rig {
  BlockTree tree{kLength, {32, 2}};
  at::Tensor q, k, v, w_o;

  Rig() {
    at::manual_seed(7);
    q = at::randn({2, 6, kLength, kHeadDim}).set_requires_grad(true);
    k = at::randn({2, 2, kLength, kHeadDim}) + 0.5;
    v = at::randn({2, 2, kLength, kHeadDim});
    w_o = at::randn({40, 6 * kHeadDim});
  }
};

// The sampler's figure is the calibration's for the rows that it drew: to the calibration, whose
// rows all count, their gradients alone are handed.
TEST(DamageSampler, MeasuresWhatTheCalibrationMeasures) {
  Rig rig;
  DamageSampler sampler(calibration(), 0, 2, at::kCPU, sampling(7, BasisOptions::kSolve));
  std::set<size_t> pairs_seen;
  for (int64_t step = 1; step <= 6; ++step) {
    SCOPED_TRACE(step);
    sampler.begin(step);
    sampler.reset();
    while (!sampler.draws(1)) {
    }
    const auto sample = sampler.choose(1, rig.tree, far_grams(rig.q, rig.k, rig.v, rig.tree));
    ASSERT_NE(sample, nullptr);
    ASSERT_EQ(sample->positions.size(), 7U);
    pairs_seen.insert(sample->pairs.size());
    auto gradient = at::zeros_like(rig.q);
    const auto rows = at::tensor(sample->positions, at::kLong);
    gradient.index_copy_(2, rows, at::randn({2, 6, 7, kHeadDim}));
    const auto out = exact_attention(rig.q, rig.k, rig.v);
    sampler.watch(1, rig.tree, out, rig.q, rig.k, rig.v, rig.w_o, sample);
    out.backward(gradient);

    CalibrationController reference(2, rig.tree.geometry(), kRanks);
    std::shared_ptr<LayerPlan> plan;
    reference.attend(1, rig.q, rig.k, rig.v, rig.w_o, plan).backward(gradient);
    const at::Tensor
        expected = reference.damage()[1];  // [groups, 2, levels, ranks], nats summed over rows
    const at::Tensor sums = sampler.sums().select(1, 1);
    for (int64_t level = 0; level < rig.tree.num_levels(); ++level) {
      double tokens = 0;
      for (const PairRun& run : rig.tree.runs()) {
        tokens += run.level == level ? static_cast<double>(run.count * run.query_rows) : 0;
      }
      const auto measured = sums[DamageSampler::kDamage].select(2, level),
                 wanted = expected.select(2, level) / 7 * tokens / static_cast<double>(kLength);
      EXPECT_TRUE(at::allclose(measured, wanted, 2e-3, 1e-9)) << "level " << level << "\n"
                                                              << measured << "\n"
                                                              << wanted;
      const bool seen = wanted.sum().item<double>() > 0;
      EXPECT_TRUE(
          (sums[DamageSampler::kCount].select(2, level) == (seen ? 2 : 0)).all().item<bool>());
    }
    EXPECT_EQ(sampler.sums().select(1, 0).abs().sum().item<double>(), 0)
        << "layer 0 was not sampled";
  }
  EXPECT_GT(pairs_seen.size(), 1U);
}

TEST(DamageSampler, DrawsByStepLayerAndCallAlone) {
  Rig rig;
  const PairGrams grams = far_grams(rig.q, rig.k, rig.v, rig.tree);
  DamageSampler a(calibration(), 0, 2, at::kCPU, sampling(5)),
      b(calibration(), 1, 1, at::kCPU, sampling(5));
  std::set<std::vector<int64_t>> drawn;
  for (int64_t step = 1; step <= 8; ++step) {
    a.begin(step);
    b.begin(step);
    int64_t draws = 0;
    for (int64_t call = 0; call < 8; ++call) {
      EXPECT_EQ(a.draws(0), b.draws(0));
      draws += a.draws(1) ? 1 : 0;
      const auto one = a.choose(0, rig.tree, grams), other = b.choose(0, rig.tree, grams);
      EXPECT_EQ(one->positions, other->positions) << "processes that share a sequence";
      EXPECT_EQ(std::set<int64_t>(one->positions.begin(), one->positions.end()).size(), 5U);
      drawn.insert(one->positions);
    }
    EXPECT_EQ(draws, 8 / DamageSampler::kTurns);
  }
  EXPECT_GE(drawn.size(), 40U);
  a.pause();
  EXPECT_FALSE(a.draws(0) || a.draws(0) || a.draws(0) || a.draws(0));
}

/// Samples of these damages with the noise of a squared Gaussian, `count` of each cell.
at::Tensor samples_of(const at::Tensor& damage, int64_t count) {
  const auto y = damage.unsqueeze(0) * at::randn({count, 2, 2, 2, 4, 3}, at::kDouble).pow(2);
  return at::stack({y.sum(0), at::full_like(damage, static_cast<double>(count))});
}

TEST(OnlineTrainer, LearnsPlantedDamages) {
  const Calibration c = calibration();
  auto planted = at::zeros_like(c.damage);
  planted[1].select(1, 0) += 1.0;     // scores of layer 1
  planted[0][1].select(0, 1) -= 0.8;  // values of group 1 of layer 0
  planted[0][0][0][2] += 1.0;         // one level of one group
  planted += 0.7;                     // and everything, which changes nothing
  OnlineTrainer trainer(c);
  for (int64_t update = 0; update < 12; ++update) {
    trainer.update(samples_of(c.damage * planted.exp(), 8));
  }
  EXPECT_EQ(trainer.updates(), 12);
  EXPECT_LT(trainer.dispersion(), 6) << "2, of a squared Gaussian, and what was supposed at first";
  EXPECT_GT(trainer.dispersion(), 2);
  const auto difference = trainer.log_factors() - planted;
  EXPECT_LT(difference.abs().mean().item<double>(), 0.15);
  EXPECT_LT(difference.pow(2).mean().sqrt().item<double>(),
            0.4 * (planted - planted.mean()).pow(2).mean().sqrt().item<double>());

  // Decisions by what was learned do less of the true damage for the same operations.
  const BlockTree tree(kLength, c.geometry);
  const auto spoils = [&](const Calibration& by) {
    return expected_damage(
        scaled(c, planted),
        allocate(
            by, tree,
            {.budget = 0.8, .heads_per_group = 3, .buckets = {4, 8, 12, 16}, .update_steps = 0})
            .table);
  };
  EXPECT_LT(spoils(scaled(c, trainer.log_factors())), 0.97 * spoils(c));
}

TEST(OnlineTrainer, NoiseAloneMovesItLittle) {
  const Calibration c = calibration();
  OnlineTrainer trainer(c);
  trainer.update(at::zeros({DamageSampler::kSums, 2, 2, 2, 4, 3}, at::kDouble));
  EXPECT_EQ(trainer.log_factors().abs().max().item<double>(), 0) << "nothing seen, nothing learned";
  at::manual_seed(1);
  for (int64_t update = 0; update < 4; ++update) {
    trainer.update(samples_of(c.damage, 2));
  }
  EXPECT_LT(trainer.log_factors().pow(2).mean().sqrt().item<double>(), 0.35)
      << "the noise of one such sum is 0.5";
  auto broken = samples_of(c.damage, 1);
  broken[0][0][0][0][0][0] = std::nan("");
  EXPECT_FALSE(error_of(ErrorKind::kNumerics, [&] { trainer.update(broken); }).empty());
}

TEST(OnlineTrainer, GoesOnFromItsState) {
  const Calibration c = calibration();
  OnlineTrainer a(c), b(c);
  a.update(samples_of(c.damage * 2, 3));
  b.load(a.state());
  const auto more = samples_of(c.damage, 3);
  a.update(more);
  b.update(more);
  EXPECT_TRUE(a.state().equal(b.state()));
  EXPECT_EQ(b.updates(), 2);
  EXPECT_FALSE(
      error_of(ErrorKind::kCheckpoint, [&] { b.load(at::zeros({5}, at::kDouble)); }).empty());
}

TEST(Calibration, ScalesWhatGatesLeaveAndExpectsWhatTheTableSays) {
  Calibration c = calibration();
  c.gates = at::tensor({0.1, 0.4}, at::kDouble);
  at::manual_seed(9);
  c.gated_damage = at::rand({2, 2, 2, 4, 3, 2}, at::kDouble);
  auto factors = at::zeros_like(c.damage);
  factors[1][0][0][2][1] = std::log(3.0);  // scores at rank 8
  factors[1][0][1][2][0] = std::log(5.0);  // values at rank 4
  const Calibration s = scaled(c, factors);
  const auto cell = [](const Calibration& of, int64_t kind) {
    return of.gated_damage[1][0][kind][2][1 - kind][1].item<double>();
  };
  EXPECT_DOUBLE_EQ(cell(s, 0), 3 * cell(c, 0));
  EXPECT_DOUBLE_EQ(cell(s, 1), 5 * cell(c, 1));
  EXPECT_TRUE(s.gated_damage[0].equal(c.gated_damage[0]));
  RankTable table(2, 2, 4, {16, 16});
  EXPECT_EQ(expected_damage(s, table), 0);
  table.at(1, 0, 2) = {8, 16};
  EXPECT_DOUBLE_EQ(expected_damage(s, table), 3 * c.damage[1][0][0][2][1].item<double>());
  table.at(1, 0, 2) = {8, 4, 0.4F};
  EXPECT_DOUBLE_EQ(expected_damage(s, table), cell(s, 0) + cell(s, 1));
}

}  // namespace
}  // namespace drrl
