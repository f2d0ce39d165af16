#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "core/attention_part.h"
#include "policy/calibration.h"
#include "policy/controller.h"
#include "policy/rank_policy.h"
#include "tests/support/error_of.h"

namespace drrl {
namespace {

Calibration make_calibration(int64_t layers, int64_t head_dim, std::vector<int64_t> ranks) {
  Calibration c;
  c.head_dim = head_dim;
  c.geometry = {16, 4};
  c.seq_len = 128;
  c.tokens = 1000;
  c.model = "model";
  c.data = "text";
  c.ranks = std::move(ranks);
  for (int64_t layer = 0; layer < layers; ++layer) {
    c.score_damage.emplace_back();
    c.value_damage.emplace_back();
    for (const int64_t rank : c.ranks) {
      // Layers differ by orders of magnitude, and values matter less than scores.
      const double base = std::pow(10.0, static_cast<double>(layer % 3)) * std::exp(-0.1 * static_cast<double>(rank));
      c.score_damage.back().push_back(base);
      c.value_damage.back().push_back(0.3 * base);
    }
  }
  return c;
}

double damage_of(const Calibration& c, const std::vector<Ranks>& ranks) {
  double sum = 0;
  for (size_t layer = 0; layer < ranks.size(); ++layer) {
    for (size_t i = 0; i < c.ranks.size(); ++i) {
      sum += ranks[layer].qk == c.ranks[i] ? c.score_damage[layer][i] : 0;
      sum += ranks[layer].v == c.ranks[i] ? c.value_damage[layer][i] : 0;
    }
  }
  return sum;
}

double mean_share(const std::vector<Ranks>& ranks, int64_t head_dim) {
  double sum = 0;
  for (const Ranks& r : ranks) {
    sum += static_cast<double>(r.qk + r.v);
  }
  return sum / (2.0 * static_cast<double>(head_dim) * static_cast<double>(ranks.size()));
}

std::filesystem::path temporary(const std::string& name) {
  const auto folder = std::filesystem::temp_directory_path() / ("drrl_policy_test_" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  return folder / name;
}

TEST(RankBuckets, ComeFromTheDevice) {
  EXPECT_EQ(rank_buckets(at::kCPU, 64), (std::vector<int64_t>{16, 32, 48, 64}));
  EXPECT_EQ(rank_buckets(at::Device(at::kCUDA, 0), 128), (std::vector<int64_t>{32, 64, 96, 128}));
  EXPECT_EQ(rank_buckets(at::kCPU, 16), (std::vector<int64_t>{4, 8, 12, 16}));
}

TEST(Allocation, IsTheBestOfAllAllocations) {  // against exhaustive search
  const Calibration c = make_calibration(3, 64, {16, 32, 48});
  const std::vector<int64_t> buckets{16, 32, 48, 64};
  for (const double budget : {0.25, 0.3, 0.4, 0.5, 0.585, 0.8, 1.0}) {
    const auto chosen = allocate(c, budget, 3, 64, buckets);
    EXPECT_LE(mean_share(chosen, 64), budget + 1e-12);
    double best = 1e300;
    for (int code = 0; code < 4096; ++code) {
      std::vector<Ranks> candidate;
      for (int layer = 0; layer < 3; ++layer) {
        candidate.push_back({buckets[code >> (4 * layer) & 3], buckets[code >> (4 * layer + 2) & 3]});
      }
      if (mean_share(candidate, 64) <= budget + 1e-12) {
        best = std::min(best, damage_of(c, candidate));
      }
    }
    EXPECT_NEAR(damage_of(c, chosen), best, 1e-12) << "budget " << budget;
  }
}

TEST(Allocation, RefusesWhatDoesNotFit) {
  const Calibration c = make_calibration(3, 64, {16, 32, 48});
  const std::vector<int64_t> buckets{16, 32, 48, 64};
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { allocate(c, 0.2, 3, 64, buckets); }).find("0.25"), std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { allocate(c, 1.5, 3, 64, buckets); }).find("1.5"), std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { allocate(c, 0.5, 4, 64, buckets); }).find("3 layers"), std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { allocate(c, 0.5, 3, 128, buckets); }).find("128"), std::string::npos);
}

TEST(Calibration, SurvivesItsFile) {
  const Calibration c = make_calibration(4, 64, {16, 48});
  c.save(temporary("ranks.json"));
  const Calibration back = Calibration::load(temporary("ranks.json"));
  EXPECT_EQ(back.ranks, c.ranks);
  EXPECT_EQ(back.score_damage, c.score_damage);
  EXPECT_EQ(back.value_damage, c.value_damage);
  EXPECT_EQ(back.geometry, c.geometry);
  EXPECT_EQ(back.tokens, c.tokens);
}

TEST(Calibration, NamesWhatIsWrongWithAFile) {
  const auto file = temporary("bad.json");
  EXPECT_NE(error_of(ErrorKind::kModel, [&] { Calibration::load(temporary("none.json")); }).find("none.json"), std::string::npos);
  const auto expect = [&](const std::string& text, const std::string& part) {
    std::ofstream(file) << text;
    const std::string message = error_of(ErrorKind::kModel, [&] { Calibration::load(file); });
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_NE(message.find("bad.json"), std::string::npos) << message;
  };
  expect("", "not a calibration file");
  expect("{\"format\": \"other\"}", "\"other\"");
  make_calibration(2, 64, {16, 32}).save(file);
  std::ifstream in(file);
  const std::string good((std::istreambuf_iterator<char>(in)), {});
  auto with = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    return text;
  };
  expect(with("\"head_dim\": 64", "\"head_dim\": 32"), "ranks");
  expect(with("\"seq_len\"", "\"seqlen\""), "seq_len");
  std::string negative = good;
  const size_t entry = negative.find_first_of("0123456789", negative.find("score_damage"));
  negative.insert(entry, "-");
  expect(negative, "not negative");
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
    return {make_full_policy(), make_fixed_policy(8, d), make_energy_policy(0.9, rank_buckets(at::kCPU, d)),
            make_dp_policy(make_calibration(2, d, {8, 16, 24}), 0.5, 2, d, rank_buckets(at::kCPU, d))};
  }
};

TEST(Controller, FullPolicyIsExactAttention) {
  const Rig rig;
  LowRankController controller(make_full_policy(), rig.geometry);
  std::shared_ptr<LayerPlan> plan;
  EXPECT_TRUE(at::equal(controller.attend(0, rig.q, rig.k, rig.v, rig.w_o, plan), exact_attention(rig.q, rig.k, rig.v)));
  const AttentionStatistics s = controller.take_statistics();
  EXPECT_EQ(s.flops, s.exact_flops);
  EXPECT_EQ(s.solves, 0);
  EXPECT_EQ(s.rank_qk / static_cast<double>(s.decisions), 32);
}

TEST(Controller, EveryPolicyIsStrictlyCausal) {
  const Rig rig;
  for (const auto& policy : rig.policies()) {
    SCOPED_TRACE(policy->describe());
    LowRankController controller(policy, rig.geometry);
    std::shared_ptr<LayerPlan> plan;
    const auto before = controller.attend(0, rig.q, rig.k, rig.v, rig.w_o, plan);
    for (const int64_t t : {3, 40, 99, 164, 199}) {
      const auto changed = [&](const at::Tensor& x) {
        auto copy = x.clone();
        copy.narrow(2, t, rig.length - t).mul_(-2.0).add_(0.5);
        return copy;
      };
      plan.reset();
      const auto after = controller.attend(0, changed(rig.q), changed(rig.k), changed(rig.v), rig.w_o, plan);
      EXPECT_TRUE(at::equal(before.narrow(2, 0, t), after.narrow(2, 0, t))) << "from token " << t;
      EXPECT_FALSE(at::equal(before.narrow(2, t, 1), after.narrow(2, t, 1)));
    }
  }
}

TEST(Controller, ReplaysAPlanBitForBitAndCountsItOnce) {
  const Rig rig;
  for (const auto& policy : rig.policies()) {
    LowRankController controller(policy, rig.geometry);
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
  const FarBases bases = solve_far_bases(rig.q, rig.k, rig.v, rig.w_o, tree, true, true);
  const auto energy = bases.scores.singular_values.pow(2);
  for (const double keep : {0.5, 0.9, 0.999}) {
    LowRankController controller(make_energy_policy(keep, rank_buckets(at::kCPU, rig.d)), rig.geometry);
    std::shared_ptr<LayerPlan> plan;
    controller.attend(0, rig.q, rig.k, rig.v, rig.w_o, plan);
    for (int64_t i = 0; i < energy.size(0); ++i) {
      const int64_t rank = plan->lowrank == nullptr ? rig.d : plan->lowrank->ranks[static_cast<size_t>(i)].qk;
      const double kept = (energy[i].narrow(0, 0, rank).sum() / energy[i].sum()).item<double>();
      EXPECT_GE(kept, keep - 1e-9);
      if (rank > 8) {
        EXPECT_LT((energy[i].narrow(0, 0, rank - 8).sum() / energy[i].sum()).item<double>(), keep) << "a smaller bucket would do";
      }
    }
  }
}

TEST(Controller, AShortSequenceIsExact) {
  const Rig rig;
  LowRankController controller(make_fixed_policy(8, rig.d), rig.geometry);
  std::shared_ptr<LayerPlan> plan;
  const auto cut = [](const at::Tensor& x) { return x.narrow(2, 0, 36); };
  EXPECT_TRUE(at::equal(controller.attend(0, cut(rig.q), cut(rig.k), cut(rig.v), rig.w_o, plan), exact_attention(cut(rig.q), cut(rig.k), cut(rig.v))));
}

TEST(Policies, RefuseSenselessSettings) {
  EXPECT_NE(error_of(ErrorKind::kUsage, [] { make_fixed_policy(65, 64); }).find("65"), std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kUsage, [] { make_fixed_policy(0, 64); }).find("0"), std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kUsage, [] { make_energy_policy(1.5, {16}); }).find("1.5"), std::string::npos);
}

// The damage that calibration predicts must rank layers' errors as they really move the loss: here a two-layer toy whose "log-likelihood" is linear
// in the attention outputs, so that 1/2 (g . D)^2 per position can be computed by hand.
TEST(CalibrationController, MeasuresHalfTheSquaredMovementOfEachPosition) {
  const Rig rig;
  CalibrationController controller(2, rig.geometry, {8, 16});
  const auto q = rig.q.clone().requires_grad_(true);
  const auto g = at::randn({1, rig.heads, rig.length, rig.d});
  std::shared_ptr<LayerPlan> plan;
  const auto out = controller.attend(1, q, rig.k, rig.v, rig.w_o, plan);
  torch::autograd::backward({(out * g).sum()});
  const BlockTree tree(rig.length, rig.geometry);
  const FarBases bases = solve_far_bases(rig.q, rig.k, rig.v, rig.w_o, tree, true, true);
  for (int kind = 0; kind < 2; ++kind) {
    for (int i = 0; i < 2; ++i) {
      const int64_t r = i == 0 ? 8 : 16;
      const Ranks ranks = kind == 0 ? Ranks{r, rig.d} : Ranks{rig.d, r};
      const auto lowrank = c10::make_intrusive<LowRankPlan>(
          tree, std::vector<Ranks>(static_cast<size_t>(rig.groups * tree.num_pairs()), ranks), bases.scores, bases.values);
      const auto error = lowrank_attention(rig.q, rig.k, rig.v, lowrank) - exact_attention(rig.q, rig.k, rig.v);
      const double expected = 0.5 * (error * g).sum({1, 3}).pow(2).sum().item<double>();
      EXPECT_NEAR(controller.damage()[1][kind][i].item<double>(), expected, 1e-4 * expected);
      EXPECT_GT(expected, 0);
      EXPECT_EQ(controller.damage()[0][kind][i].item<double>(), 0);
    }
  }
}

}  // namespace
}  // namespace drrl
