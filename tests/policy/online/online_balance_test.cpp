// Training runs of a tiny random Llama whose ranks make up for a slow tensor-parallel process, on 2
// to 4 ranks. Times are made up.
#include "policy/online/online_balance.h"

#include <map>

#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/tensor_parallel.h"
#include "models/training/trainer.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/rank_policy.h"
#include "tests/support/calibrated_fixture.h"

namespace drrl {
namespace {

class OnlineBalancing : public CalibratedTraining {
 protected:
  static constexpr int64_t kEvery = 2;
  static constexpr double kBudget = 0.9;

  static RankBalance balance(int64_t processes) {
    std::vector<int64_t> groups;
    for (int64_t p = 0; p < processes; ++p) {
      groups.push_back(partition(kGroups, processes, p).count);
    }
    return {calibration(),
            BlockTree(kSeqLen, kGeometry),
            2,
            groups,
            {.budget = kBudget,
             .buckets = rank_buckets(at::kCPU, kHeadDim),
             .update_steps = 1,
             .damage = 0.0005}};
  }

  static std::shared_ptr<LowRankController> controller(const Mesh& mesh) {
    const IndexRange groups = partition(kGroups, mesh.tp().size(), mesh.tp().rank());
    const Calibration c = calibration();
    return std::make_shared<LowRankController>(
        make_dp_policy(c, kBudget, rank_buckets(at::kCPU, kHeadDim), 1), kGeometry,
        BasisOptions{1, c.bases.narrow(1, groups.begin, groups.count)}, groups.begin);
  }

  struct Outcome {
    std::vector<double> losses;
    std::map<std::string, double> figures;
    BalancedRanks ranks;
    std::vector<double> speeds;
    double flops = 0;  // of this process's attention in the last step
  };

  /// Tells the balance of times as they would be; writes down its figures.
  class Followed final : public StepObserver {
   public:
    Followed(LowRankController& controller, OnlineBalance& online, Outcome& outcome,
             double seconds_per_cost, int64_t outlier, size_t process)
        : controller_(controller),
          online_(online),
          outcome_(outcome),
          seconds_per_cost_(seconds_per_cost),
          outlier_(outlier),
          process_(process) {}
    void begin_step(int64_t step) override { online_.begin_step(step_ = step); }
    void end_step(AttentionStatistics& spent) override {
      spent += controller_.take_statistics();
      EXPECT_GT(spent.attention_ms, 0) << "the controller was not told to measure";
      outcome_.flops = spent.flops;
      spent.attention_ms = online_.ranks().cost(process_) * seconds_per_cost_ *
                           (step_ == outlier_ ? 100 : 1);
      online_.end_step(spent);
    }
    std::vector<std::pair<std::string, double>> figures() override {
      const auto all = online_.figures();
      outcome_.figures = {all.begin(), all.end()};
      return all;
    }

   private:
    LowRankController& controller_;
    OnlineBalance& online_;
    Outcome& outcome_;
    double seconds_per_cost_;
    int64_t outlier_;
    size_t process_;
    int64_t step_ = 0;
  };

  /// Six steps in which attention takes `seconds_per_cost` of this process for what its ranks cost,
  /// in step `outlier` a hundred times as long.
  Outcome run(const Mesh& mesh, double seconds_per_cost, int64_t outlier = 0) const {
    const auto attention = controller(mesh);
    OnlineBalance online(attention, balance(mesh.tp().size()), mesh.tp(), kEvery, /*on_cpu=*/true);
    Outcome outcome{{}, {}, online.ranks(), {}};
    CausalLM model(config(), mesh.tp(), attention);
    model.initialize(5);
    const auto followed = std::make_shared<Followed>(*attention, online, outcome, seconds_per_cost,
                                                     outlier,
                                                     static_cast<size_t>(mesh.tp().rank()));
    TrainerOptions o;
    o.global_batch = 4;
    o.steps = 6;
    o.schedule = {.lr = 1e-2, .min_lr = 1e-3, .warmup_tokens = 0, .total_tokens = 6 * 4 * kSeqLen};
    TrainerCallbacks callbacks;
    callbacks.on_step = [&](const StepReport& report) { outcome.losses.push_back(report.loss); };
    Trainer(o, model, mesh, train_, nullptr, {followed}, callbacks).run();
    outcome.ranks = online.ranks();
    outcome.speeds = online.speeds();
    return outcome;
  }

  bool agree(const std::vector<double>& values, const Group& group) const {
    const at::Tensor own = at::tensor(values, at::kDouble);
    at::Tensor least = own.clone(), most = own.clone();
    group.all_reduce(least, ReduceOp::kMin);
    group.all_reduce(most, ReduceOp::kMax);
    return least.equal(most);
  }

  static std::vector<double> flatten(const RankTable& table) {
    std::vector<double> all;
    for (int64_t layer = 0; layer < table.layers(); ++layer) {
      for (int64_t group = 0; group < table.groups(); ++group) {
        for (int64_t level = 0; level < table.levels(); ++level) {
          all.insert(all.end(), {static_cast<double>(table.at(layer, group, level).qk),
                                 static_cast<double>(table.at(layer, group, level).v)});
        }
      }
    }
    return all;
  }
};

TEST_F(OnlineBalancing, RelievesTheSlowProcessOfItsGroupAlone) {
  const int64_t tp = size_ > kGroups ? 2 : size_;
  const Mesh mesh = make_mesh(tp, size_ / tp);
  const bool slow = rank_ == tp - 1;  // and nobody in other replicas
  const Outcome steady = run(mesh, 1), lame = run(mesh, slow ? 2 : 1);
  EXPECT_TRUE(agree(lame.speeds, mesh.tp()));
  EXPECT_TRUE(agree(flatten(lame.ranks.table), mesh.tp()));
  if (mesh.dp().rank() > 0) {
    EXPECT_EQ(flatten(lame.ranks.table), flatten(steady.ranks.table));
  } else {
    std::vector<double> speeds(static_cast<size_t>(tp), 1.0);
    speeds.back() = 0.5;
    EXPECT_EQ(lame.speeds, speeds);
    EXPECT_EQ(flatten(lame.ranks.table), flatten(balance(tp).ranks(speeds).table));
    const auto process = static_cast<size_t>(mesh.tp().rank());
    if (slow) {
      EXPECT_LT(lame.ranks.cost(process), 0.97 * steady.ranks.cost(process));
      EXPECT_LT(lame.flops, 0.97 * steady.flops) << "the controller goes on with other ranks";
      EXPECT_EQ(lame.figures.at("balance_slowest"), 0.5);
      EXPECT_LT(lame.figures.at("balance_time"), 0.97);
      EXPECT_LE(lame.figures.at("balance_damage"), 0.0005 + 1e-12);
    } else {
      EXPECT_GE(lame.ranks.cost(process), steady.ranks.cost(process));
    }
  }
  if (rank_ == 0) {  // measured in step 2, in effect from step 3 on
    ASSERT_EQ(lame.losses.size(), 6U);
    EXPECT_TRUE(std::equal(lame.losses.begin(), lame.losses.begin() + 2, steady.losses.begin()));
    EXPECT_NE(lame.losses[2], steady.losses[2]);
  }
}

TEST_F(OnlineBalancing, TakesNoNoticeOfOneSlowStep) {
  const int64_t tp = size_ > kGroups ? 2 : size_;
  const Mesh mesh = make_mesh(tp, size_ / tp);
  const Outcome steady = run(mesh, 1);
  for (const int64_t outlier :
       {1, 3}) {  // the first one of a run, which is no measure, and one of two
    SCOPED_TRACE(outlier);
    const Outcome once = run(mesh, 1, rank_ == 0 ? outlier : 0);
    EXPECT_EQ(flatten(once.ranks.table), flatten(steady.ranks.table));
    EXPECT_EQ(once.speeds, steady.speeds);
  }
}

TEST_F(OnlineBalancing, RefusesWhatItCannotMeasure) {
  const Mesh mesh = make_mesh(size_ > kGroups ? 2 : size_, size_ > kGroups ? size_ / 2 : 1);
  const std::string message = error_of(ErrorKind::kUsage, [&] {
    OnlineBalance(controller(mesh), balance(mesh.tp().size()), mesh.tp(), 0, true);
  });
  EXPECT_NE(message.find("every 0 steps"), std::string::npos) << message;
  const Mesh split = make_mesh(1, 1, size_);
  const auto waits = std::make_shared<LowRankController>(
      make_fixed_policy(4, kHeadDim), kGeometry, BasisOptions{}, 0, GuardOptions{}, split.cp());
  const std::string waiting = error_of(ErrorKind::kUsage,
                                       [&] { OnlineBalance(waits, balance(1), Group(), 1, true); });
  EXPECT_NE(waiting.find(c10::str("split over ", size_, " processes")), std::string::npos)
      << waiting;
}

}  // namespace
}  // namespace drrl
