#include "policy/attention/audit.h"

#include <gtest/gtest.h>

#include "core/attention/exact_attention.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/rank_policy.h"

namespace drrl {
namespace {

struct Rig {
  int64_t heads = 6, groups = 3, length = 215, d = 32;
  Geometry geometry{32, 4};
  at::Tensor q, k, v, w_o;

  Rig() {
    at::manual_seed(5);
    const auto mix = at::matmul(at::diag(at::logspace(0, -1.5, d)), at::randn({d, d}));
    q = at::matmul(at::randn({2, heads, length, d}), mix);
    k = at::matmul(at::randn({2, groups, length, d}), mix);
    v = at::matmul(at::randn({2, groups, length, d}), mix);
    w_o = at::randn({64, heads * d});
  }
};

int64_t pairs_of(const AuditReport& report) {
  int64_t pairs = 0;
  for (const auto& level : report.levels) {
    pairs += level.pairs;
  }
  return pairs;
}

int64_t violations_of(const AuditReport& report) {
  int64_t violations = report.block_violations;
  for (const auto& level : report.levels) {
    violations += level.violations;
  }
  return violations;
}

TEST(Audit, ChangesNothingAndFindsNoViolation) {
  const Rig rig;
  const BlockTree tree(rig.length, rig.geometry);
  RankTable table(1, 3, 3, {8, 16});
  table.at(0, 1, 1) = {32, 8};
  table.at(0, 2, 2) = {32, 32};
  for (const int64_t steps : {BasisOptions::kSolve, int64_t{2}}) {
    const auto inner = std::make_shared<LowRankController>(make_table_policy(table, "table"),
                                                           rig.geometry, BasisOptions{steps, {}});
    AuditController audit(inner, 5);
    std::shared_ptr<LayerPlan> plan, audited_plan;
    const auto out = inner->attend(0, rig.q, rig.k, rig.v, rig.w_o, plan);
    EXPECT_TRUE(out.equal(audit.attend(0, rig.q, rig.k, rig.v, rig.w_o, audited_plan)));
    EXPECT_TRUE(out.equal(audit.attend(0, rig.q, rig.k, rig.v, rig.w_o,
                                       audited_plan)));  // a replay is not audited again
    const AuditReport& report = audit.report();
    // Seven blocks: 3 + 2 + 1 pairs; group 1 is exact in the scores of level 1, group 2 in all of
    // level 2.
    EXPECT_EQ(pairs_of(report), 2 * (3 * 6 - 2 - 1));
    EXPECT_EQ(report.blocks, 2 * (3 * 6 - 1)) << "block 4 sees nothing but the pair of level 2";
    EXPECT_EQ(violations_of(report), 0);
    EXPECT_GE(report.output_tightness.quantile(0), 1);
    EXPECT_LE(report.output_tightness.quantile(0.5), report.eq9_tightness.quantile(0.5));
    for (const auto& level : report.levels) {
      EXPECT_NEAR(level.tightness.quantile(0), 1, 1e-5);
      EXPECT_NEAR(level.tightness.quantile(1), 1, 1e-5);
      EXPECT_NEAR(level.lagged_prediction.quantile(0.5), 1, 0.5);
    }
    EXPECT_GT(report.output_error.quantile(0.5), 1e-3);
    EXPECT_LE(report.shift.quantile(1), report.weyl.quantile(1));
  }
}

TEST(Audit, CertifiesWhatGatesLeave) {
  const Rig rig;
  double error[2];
  for (const bool gates : {false, true}) {
    const Ranks ranks = gates ? Ranks{16, 16, 0.01F} : Ranks{16, 16};
    AuditController audit(std::make_shared<LowRankController>(
                              make_table_policy(RankTable(1, 3, 3, ranks), "table"), rig.geometry),
                          8);
    std::shared_ptr<LayerPlan> plan;
    audit.attend(0, rig.q, rig.k, rig.v, rig.w_o, plan);
    const AuditReport& report = audit.report();
    EXPECT_EQ(pairs_of(report), 2 * 3 * 6);
    EXPECT_EQ(violations_of(report), 0);
    for (const auto& level : report.levels) {
      EXPECT_NEAR(level.tightness.quantile(0), 1, 1e-5);
      EXPECT_NEAR(level.tightness.quantile(1), 1, 1e-5);
    }
    error[gates] = report.output_error.quantile(0.5);
  }
  EXPECT_LT(error[true], 0.5 * error[false]);
}

// Shows plans of higher ranks than it serves.
class Liar final : public AttentionController {
 public:
  explicit Liar(const Rig& rig)
      : serves_(make_fixed_policy(1, rig.d), rig.geometry, {BasisOptions::kSolve, {}}),
        claims_(make_fixed_policy(30, rig.d), rig.geometry, {BasisOptions::kSolve, {}}) {}
  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) override {
    claims_.attend(layer, q, k, v, w_o, plan);
    std::shared_ptr<LayerPlan> served;
    return serves_.attend(layer, q, k, v, w_o, served);
  }

 private:
  LowRankController serves_, claims_;
};

TEST(Audit, SeesOutputsThatAreWorseThanTheirCertificate) {
  const Rig rig;
  AuditController audit(std::make_shared<Liar>(rig), 5);
  std::shared_ptr<LayerPlan> plan;
  audit.attend(0, rig.q, rig.k, rig.v, rig.w_o, plan);
  EXPECT_GT(audit.report().block_violations, audit.report().blocks / 2);
}

TEST(Audit, ExactAttentionHasNothingToAudit) {
  const Rig rig;
  AuditController audit(std::make_shared<LowRankController>(make_exact_policy(), rig.geometry), 1);
  std::shared_ptr<LayerPlan> plan;
  audit.attend(0, rig.q, rig.k, rig.v, rig.w_o, plan);
  EXPECT_EQ(pairs_of(audit.report()) + audit.report().blocks, 0);
  EXPECT_TRUE(std::isnan(audit.report().output_tightness.quantile(0.5)));
}

}  // namespace
}  // namespace drrl
