// Training runs of a tiny random Llama whose rank policy learns on the way, on 1 to 4 ranks.
#include "policy/online/online_policy.h"

#include <map>

#include "core/error.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/tensor_parallel.h"
#include "models/training/trainer.h"
#include "policy/allocation/allocation.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/rank_policy.h"
#include "tests/support/calibrated_fixture.h"
#include "tests/support/strict_nccl.h"

namespace drrl {
namespace {

class OnlineTraining : public CalibratedTraining {
 protected:
  /// A policy that learns, on the groups of `mesh`.
  struct Learner {
    std::shared_ptr<LowRankController> controller;
    std::shared_ptr<OnlinePolicy> online;
  };
  Learner learner(const Mesh& mesh, int64_t update_every,
                  std::chrono::milliseconds timeout = std::chrono::seconds(60)) const {
    const IndexRange groups = partition(kGroups, mesh.tp().size(), mesh.tp().rank());
    const Calibration c = calibration();
    const std::vector<int64_t> buckets = rank_buckets(at::kCPU, kHeadDim);
    Learner result;
    const BasisOptions bases{.update_steps = kUpdates,
                             .start = c.bases.narrow(1, groups.begin, groups.count)};
    result.controller = std::make_shared<LowRankController>(
        make_dp_policy(c, kBudget, buckets, kUpdates), kGeometry, bases, groups.begin);
    OnlinePolicy::Options options{
        .update_every = update_every, .sampling = {.rows = 4, .buckets = buckets}, .allocate = {}};
    options.sampling.gradient_scale = 4.0 * kSeqLen;
    options.sampling.update_steps = kUpdates;
    options.allocate = [buckets](const Calibration& by) {
      return allocate(by, BlockTree(kSeqLen, kGeometry),
                      {.budget = kBudget,
                       .heads_per_group = 2,
                       .buckets = buckets,
                       .update_steps = kUpdates})
          .table;
    };
    Group channel = mesh.world().size() == 1 ? Group() : make_channel(timeout);
    if (journal_) {
      channel = over_strict_nccl(channel, journal_);
    }
    result.online = std::make_shared<OnlinePolicy>(result.controller, c, groups.begin, groups.count,
                                                   at::kCPU, std::move(channel),
                                                   std::move(options));
    return result;
  }
  static Group make_channel(std::chrono::milliseconds timeout) {
    return create_world_group("policy", Environment::detect(), at::kCPU, timeout);
  }

  struct Outcome {
    std::vector<double> losses;
    std::map<std::string, double> figures;  // of the last step
    Calibration learned;
    int64_t updates = 0;
  };

  struct Plan {
    int64_t steps = 8, update_every = 2;
    std::string output = {};
    bool activation_checkpoint = false, learn = true;
    int64_t stop_after = 0;
  };

  /// The online policy with its controller's statistics; writes down its figures.
  class Followed final : public StepObserver {
   public:
    Followed(Learner learner, Outcome& outcome) : learner_(std::move(learner)), outcome_(outcome) {}
    void begin_step(int64_t step) override { learner_.online->begin_step(step); }
    void end_step(AttentionStatistics& spent) override {
      spent += learner_.controller->take_statistics();
      learner_.online->end_step(spent);
    }
    std::vector<std::pair<std::string, double>> figures() override {
      const auto all = learner_.online->figures();
      outcome_.figures = {all.begin(), all.end()};
      return all;
    }
    std::string state_name() const override { return learner_.online->state_name(); }
    std::string save() override { return learner_.online->save(); }
    void load(const std::string& state) override { learner_.online->load(state); }

   private:
    Learner learner_;
    Outcome& outcome_;
  };

  Outcome run(const Mesh& mesh, const Plan& plan) const {
    Outcome outcome;
    const Learner policy = learner(mesh, plan.learn ? plan.update_every : 1000);
    CausalLM model(config(), mesh.tp(), policy.controller,
                   {.activation_checkpoint = plan.activation_checkpoint});
    model.initialize(5);
    TrainerOptions o;
    o.global_batch = 4;
    o.steps = plan.steps;
    o.schedule = {.lr = 1e-2, .min_lr = 1e-3, .warmup_tokens = 0, .total_tokens = 8 * 4 * kSeqLen};
    o.resume = true;
    if (!plan.output.empty()) {
      o.output = folder_ / plan.output;
    }
    int64_t done = 0;
    TrainerCallbacks callbacks;
    callbacks.on_step = [&](const StepReport& report) { outcome.losses.push_back(report.loss); };
    callbacks.stop_requested = [&] { return plan.stop_after > 0 && ++done == plan.stop_after; };
    Trainer trainer(o, model, mesh, train_, plan.output.empty() ? valid_ : nullptr,
                    {std::make_shared<Followed>(policy, outcome)}, callbacks);
    trainer.run();
    policy.online->finish();
    outcome.learned = policy.online->calibration();
    outcome.updates = policy.online->updates();
    return outcome;
  }

  static constexpr double kBudget = 0.9;
  static constexpr int64_t kUpdates = 1;
  std::shared_ptr<Journal> journal_;  // of groups under NCCL's rules, if they are
};

/// Whether all processes hold the same damages.
bool agree(const Calibration& learned) {
  at::Tensor least = learned.damage.clone(), most = learned.damage.clone();
  MPI_Allreduce(MPI_IN_PLACE, least.data_ptr<double>(), static_cast<int>(least.numel()), MPI_DOUBLE,
                MPI_MIN, MPI_COMM_WORLD);
  MPI_Allreduce(MPI_IN_PLACE, most.data_ptr<double>(), static_cast<int>(most.numel()), MPI_DOUBLE,
                MPI_MAX, MPI_COMM_WORLD);
  return least.equal(most);
}

TEST_F(OnlineTraining, LearnsAlikeOnEveryProcess) {
  const Outcome alone = run(Mesh(), {});
  EXPECT_EQ(alone.updates, 4);
  EXPECT_FALSE(alone.learned.damage.equal(calibration().damage));
  if (rank_ == 0) {
    EXPECT_EQ(alone.figures.at("policy_updates"), 3) << "the fourth is under way after step 8";
    EXPECT_GT(alone.figures.at("policy_distance"), 0.01);
    EXPECT_GT(alone.figures.at("policy_damage"), 0);
    EXPECT_LE(alone.figures.at("policy_damage"), alone.figures.at("policy_damage_calibrated"));
    EXPECT_GT(alone.figures.at("policy_attention_ms"), 0);
    EXPECT_GT(alone.figures.at("policy_sample_ms"), 0);
  }
  for (const int64_t tp : {int64_t{1}, int64_t{2}, int64_t{3}}) {
    if (size_ % tp != 0 || size_ == 1) {
      continue;
    }
    SCOPED_TRACE(tp);
    const Outcome together = run(make_mesh(tp, size_ / tp), {});
    EXPECT_TRUE(agree(together.learned));
    EXPECT_EQ(together.updates, 4);
    if (tp == size_) {  // the same rows were drawn
      EXPECT_TRUE(at::allclose(together.learned.damage, alone.learned.damage, 1e-3))
          << (together.learned.damage / alone.learned.damage - 1).abs().max();
    }
    if (rank_ == 0) {
      EXPECT_NEAR(together.losses.back(), alone.losses.back(), tp == size_ ? 1e-4 : 0.1);
      EXPECT_GE(together.figures.at("policy_slowest"), 1);
    }
  }
}

TEST_F(OnlineTraining, KeepsNcclsRules) {
  if (size_ == 1) {
    return;
  }
  for (const int64_t tp : {int64_t{1}, int64_t{2}, int64_t{3}}) {
    if (size_ % tp != 0) {
      continue;
    }
    SCOPED_TRACE(tp);
    journal_ = std::make_shared<Journal>();
    const Mesh inner = make_mesh(tp, size_ / tp);
    const Outcome strict = run(
        over_strict_nccl(inner, journal_),
        {.steps = 5, .output = c10::str("strict", tp), .activation_checkpoint = true});
    EXPECT_TRUE(agree(strict.learned));
    expect_nccls_rules_kept(*journal_);
  }
}

TEST_F(OnlineTraining, ActivationCheckpointsChangeNothing) {
  const Outcome plain = run(Mesh(), {}),
                checkpointed = run(Mesh(), {.activation_checkpoint = true});
  EXPECT_TRUE(at::allclose(plain.learned.damage, checkpointed.learned.damage, 1e-6));
  EXPECT_EQ(plain.updates, checkpointed.updates);
}

TEST_F(OnlineTraining, ChangesDecisionsButNotBeforeItsTime) {
  const Outcome learning = run(Mesh(), {}), still = run(Mesh(), {.learn = false});
  ASSERT_EQ(learning.losses.size(), 8U);
  // The first update is posted after step 2 and in effect from step 5 on.
  EXPECT_TRUE(
      std::equal(learning.losses.begin(), learning.losses.begin() + 4, still.losses.begin()));
  EXPECT_NE(learning.losses.back(), still.losses.back());
  EXPECT_EQ(still.updates, 0);
}

TEST_F(OnlineTraining, ResumesBitForBit) {
  const int64_t tp = size_ > kGroups ? 2 : size_;
  const Mesh layout = make_mesh(tp, size_ / tp);
  const Outcome whole = run(layout, {.output = "whole"});
  // Stopped within a period, with a round under way and samples that were not sent.
  const Outcome first = run(layout, {.output = "parts", .stop_after = 5}),
                second = run(layout, {.output = "parts"});
  EXPECT_TRUE(second.learned.damage.equal(whole.learned.damage));
  EXPECT_EQ(second.updates, whole.updates);
  if (rank_ == 0) {
    ASSERT_EQ(first.losses.size(), 5U);
    ASSERT_EQ(second.losses.size(), 3U);
    EXPECT_TRUE(std::equal(second.losses.begin(), second.losses.end(), whole.losses.begin() + 5));
  }
}

TEST_F(OnlineTraining, ResumesOnAnotherLayout) {
  if (size_ == 1 || size_ > kGroups) {
    return;
  }
  // Stopped at the end of a period: nothing is dropped, and what the trainer knows goes on.
  const Outcome first = run(make_mesh(size_, 1), {.output = "moved", .stop_after = 4});
  const Outcome second = run(make_mesh(1, size_), {.output = "moved"});
  EXPECT_TRUE(agree(second.learned));
  EXPECT_EQ(second.updates, 4);
  EXPECT_EQ(first.updates, 2);
}

TEST_F(OnlineTraining, ProcessesThatDecideOtherwiseAreNamed) {
  if (size_ == 1) {
    return;
  }
  const Mesh layout = make_mesh(1, size_);
  const Learner policy = learner(layout, 1, std::chrono::milliseconds(500));
  policy.online->begin_step(1);
  if (rank_ + 1 == size_) {  // as broken memory might do it
    std::string state = policy.online->save();
    const double other = 0.5;
    std::copy_n(reinterpret_cast<const char*>(&other), sizeof(other),
                state.begin() + 7 * sizeof(double));
    policy.online->load(state);
  }
  AttentionStatistics nothing;
  policy.online->end_step(nothing);
  if (rank_ == 0) {
    const std::string message = error_of(ErrorKind::kCommunication,
                                         [&] { policy.online->finish(); });
    EXPECT_NE(message.find(c10::str("world rank ", size_ - 1, " decides ranks by other damages")),
              std::string::npos)
        << message;
  } else {
    EXPECT_FALSE(error_of(ErrorKind::kCommunication, [&] { policy.online->finish(); }).empty());
  }
}

TEST_F(OnlineTraining, RefusesWhatItCannotTrain) {
  const auto controller = std::make_shared<LowRankController>(make_fixed_policy(4, kHeadDim),
                                                              kGeometry);
  const auto refused = [&](int64_t every) {
    return error_of(ErrorKind::kUsage, [&] {
      OnlinePolicy(controller, calibration(), 0, kGroups, at::kCPU, Group(),
                   {.update_every = every, .sampling = {.buckets = {2, 4, 6, 8}}, .allocate = {}});
    });
  };
  EXPECT_NE(refused(1).find("'fixed, rank 4' does not decide by calibrated damages"),
            std::string::npos);
  EXPECT_NE(refused(0).find("every 0 steps"), std::string::npos);
}

}  // namespace
}  // namespace drrl
