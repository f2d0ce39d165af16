// Sequences split over 2, 3 and 4 processes, alone and times tensor parallelism, against one
// process that has them whole.
#include <ATen/Parallel.h>

#include "core/error.h"
#include "distributed/topology/mesh.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/tensor_parallel.h"
#include "policy/attention/layer_plan.h"
#include "policy/attention/lowrank_controller.h"
#include "tests/support/io_support.h"
#include "tests/support/reference_llama.h"
#include "tests/support/tensor_parallel_fixture.h"

namespace drrl::test {
namespace {

// Short blocks, whose bases are solved; blocks of at least d tokens, whose bases are updated from
// the first pair's.
struct Case {
  Geometry geometry;
  int64_t length;
};
constexpr Case kSolved{{8, 2}, 131};    // 17 blocks, the last of one token
constexpr Case kUpdated{{16, 0}, 246};  // 16 blocks, the last short, no sinks

class ContextParallel : public MpiTest {
 protected:
  void SetUp() override {
    MpiTest::SetUp();
    at::set_num_threads(1);
    config_.max_position_embeddings = 1100;
  }
  void TearDown() override { MPI_Barrier(MPI_COMM_WORLD); }

  static Mesh mesh(MeshShape shape) {
    return Mesh::create(Environment::detect(), shape, at::kCPU, std::chrono::seconds(60));
  }

  // Without data parallelism: that is the trainer's.
  std::vector<MeshShape> shapes() const {
    switch (size_) {
      case 4: return {{1, 1, 4}, {2, 1, 2}};
      case 6: return {{3, 1, 2}, {2, 1, 3}};
      default: return {{1, 1, size_}};
    }
  }

  std::shared_ptr<LowRankController> controller(const std::shared_ptr<RankPolicy>& policy,
                                                Geometry geometry, const Group& tp, const Group& cp,
                                                const Group& kv = {}) const {
    const int64_t first_group = kv_heads_of(config_.num_key_value_heads, tp.size(), tp.rank())
                                    .begin;
    return std::make_shared<LowRankController>(policy, geometry, BasisOptions{}, first_group,
                                               GuardOptions{}, cp, kv);
  }
  CausalLM model(const std::shared_ptr<RankPolicy>& policy, Geometry geometry, const Group& tp,
                 const Group& cp, ModelOptions options = {}, const Group& kv = {}) const {
    CausalLM result(config_, tp, controller(policy, geometry, tp, cp, kv), options);
    set_weights(result, random_weights(config_, 1), tp);
    return result;
  }

  // policies whose ranks need no Grams; the last one has its own for each layer, group and level
  static std::vector<std::shared_ptr<RankPolicy>> policies() {
    auto all = rank_policies(5);
    all.erase(all.begin() + 2);
    return all;
  }

  void expect_equal_to_one_process(const Mesh& mesh, const Case& of, at::ScalarType dtype) {
    const Text text = random_text(config_, 2, of.length);
    for (const auto& policy : policies()) {
      SCOPED_TRACE(c10::str(policy->describe(), ", ", dtype, ", tp ", mesh.shape().tp, ", cp ",
                            mesh.shape().cp, ", length ", of.length));
      // Bases are float32 in any case.
      const double close = dtype == at::kFloat ? 1e-5 : policy->exact() ? 1e-11 : 2e-6;
      CausalLM alone = model(policy, of.geometry, mesh.tp(), Group(), {.dtype = dtype}, mesh.kv());
      CausalLM split = model(policy, of.geometry, mesh.tp(), mesh.cp(), {.dtype = dtype},
                             mesh.kv());
      EXPECT_LE(relative_error(split.token_nll(text.tokens, text.labels),
                               alone.token_nll(text.tokens, text.labels)),
                std::max(close, 1e-6));
      const LossResult expected = alone.loss(text.tokens, text.labels, 0.5);
      const LossResult own = split.loss(text.tokens, text.labels, 0.5);
      at::Tensor sums = at::tensor({own.loss_sum.item<double>(), static_cast<double>(own.tokens)},
                                   at::kDouble);
      mesh.cp().all_reduce(sums);
      EXPECT_LE(relative_error(sums[0], expected.loss_sum), close);
      EXPECT_EQ(sums[1].item<double>(), expected.tokens);
      expected.loss_sum.backward();
      own.loss_sum.backward();
      for (size_t i = 0; i < alone.parameters().size(); ++i) {
        const at::Tensor& theirs = alone.parameters()[i].value.grad();
        at::Tensor sum = split.parameters()[i].value.grad().contiguous();
        mesh.cp().all_reduce(sum);
        // A bias of the keys moves all scores of a row alike: without rotation its gradient is zero
        // but for rounding.
        const double size = std::max(theirs.norm().item<double>(), 1e-3);
        EXPECT_LE((sum - theirs).norm().item<double>(), 10 * close * size)
            << alone.parameters()[i].name;
      }
    }
  }

  ModelConfig config_ = small_config();
};

TEST_F(ContextParallel, LossAndEveryGradientEqualOneProcess) {
  for (const MeshShape shape : shapes()) {
    const Mesh m = mesh(shape);
    for (const Case& of : {kSolved, kUpdated}) {
      for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
        expect_equal_to_one_process(m, of, dtype);
      }
    }
  }
}

TEST_F(ContextParallel, PairsThatNoLowRankServesAreExactOnAllProcesses) {
  for (const MeshShape shape : shapes()) {
    const Mesh m = mesh(shape);
    for (const double by : {1.0, 1e3}) {  // scores of 1e6: all pairs are exact
      Text text = random_text(config_, 1, kUpdated.length);
      text.tokens.slice(1, 0, by > 1 ? 0 : 150).fill_(3);  // or a run of one token
      const std::shared_ptr<RankPolicy> policy = make_fixed_policy(6, 16);
      const auto loss = [&](const Group& cp, const std::shared_ptr<LowRankController>& attention) {
        CausalLM result(config_, m.tp(), attention, {});
        at::NoGradGuard no_grad;
        Weights weights = random_weights(config_, 1);
        for (auto& [name, value] : weights) {
          if (name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight")) {
            value.mul_(by);
          }
        }
        set_weights(result, weights, m.tp());
        at::Tensor sum = result.loss(text.tokens, text.labels).loss_sum.to(at::kDouble).view({1});
        at::Tensor exact_pairs = at::full({1}, attention->take_statistics().exact_pairs,
                                          at::kDouble);
        cp.all_reduce(sum);
        cp.all_reduce(exact_pairs);
        return std::pair(sum.item<double>(), exact_pairs.item<double>());
      };
      const auto [alone, exact_alone] = loss(
          Group(), controller(policy, kUpdated.geometry, m.tp(), Group(), m.kv()));
      const auto [split, exact_split] = loss(
          m.cp(), controller(policy, kUpdated.geometry, m.tp(), m.cp(), m.kv()));
      EXPECT_NEAR(split, alone, 1e-3 * alone) << "times " << by;
      EXPECT_EQ(
          exact_split,
          static_cast<double>(m.cp().size()) *
              exact_alone);  // each process counts all pairs of a sequence, as it does decisions
      EXPECT_EQ(exact_alone > 0, by > 1);
    }
  }
}

TEST_F(ContextParallel, WithSharedKvHeadsAsWell) {
  if (size_ % 2 != 0 || size_ == 2) {
    return;
  }
  config_ = small_config(3, 1);
  config_.max_position_embeddings = 1100;
  const Mesh m = mesh({size_ / 2, 1, 2, config_.num_key_value_heads});
  EXPECT_EQ(m.kv().size(), size_ / 2);
  for (const Case& of : {kSolved, kUpdated}) {
    expect_equal_to_one_process(m, of, at::kDouble);
  }
}

TEST_F(ContextParallel, Gpt2sLearnedPositions) {
  config_ = small_gpt2_config();
  config_.max_position_embeddings = 1100;
  expect_equal_to_one_process(mesh(shapes().back()), kSolved, at::kDouble);
}

TEST_F(ContextParallel, TheFutureChangesNothingBeforeIt) {
  const Mesh m = mesh(shapes().back());
  for (const Case& of : {kSolved, kUpdated}) {
    const Text text = random_text(config_, 1, of.length);
    for (const auto& policy : policies()) {
      SCOPED_TRACE(policy->describe());
      CausalLM split = model(policy, of.geometry, m.tp(), m.cp());
      const at::Tensor before = split.token_nll(text.tokens, text.labels);
      for (const int64_t t : {1, 2, 30, 66, 99, 129}) {
        at::Tensor changed = text.tokens.clone();
        changed.slice(1, t) = (changed.slice(1, t) + 7).remainder(config_.vocab_size);
        const at::Tensor after = split.token_nll(changed, text.labels);
        EXPECT_TRUE(before.slice(1, 0, t).equal(after.slice(1, 0, t)))
            << "token " << t << " and later changed an earlier loss";
        EXPECT_FALSE(before.slice(1, t).equal(after.slice(1, t)));
      }
    }
  }
}

TEST_F(ContextParallel, CheckpointingChangesNoBit) {
  const Mesh m = mesh(shapes().back());
  const Text text = random_text(config_, 2, kSolved.length);
  for (const auto& policy : policies()) {
    SCOPED_TRACE(policy->describe());
    CausalLM kept = model(policy, kSolved.geometry, m.tp(), m.cp());
    CausalLM recomputed = model(policy, kSolved.geometry, m.tp(), m.cp(),
                                {.activation_checkpoint = true});
    kept.loss(text.tokens, text.labels).loss_sum.backward();
    recomputed.loss(text.tokens, text.labels).loss_sum.backward();
    for (size_t i = 0; i < kept.parameters().size(); ++i) {
      EXPECT_TRUE(kept.parameters()[i].value.grad().equal(recomputed.parameters()[i].value.grad()))
          << kept.parameters()[i].name;
    }
  }
}

// Of one forward pass, summed over the group.
AttentionStatistics statistics_of(CausalLM& model, LowRankController& controller, const Text& text,
                                  const Group& group) {
  controller.take_statistics();
  model.token_nll(text.tokens, text.labels);
  const AttentionStatistics own = controller.take_statistics();
  at::Tensor sums = at::tensor(
      {static_cast<double>(own.context_bytes), static_cast<double>(own.context_exact_bytes),
       own.flops, own.exact_flops, static_cast<double>(own.decompositions)},
      at::kDouble);
  group.all_reduce(sums);
  AttentionStatistics all;
  all.context_bytes = sums[0].item<int64_t>();
  all.context_exact_bytes = sums[1].item<int64_t>();
  all.flops = sums[2].item<double>();
  all.exact_flops = sums[3].item<double>();
  all.decompositions = sums[4].item<int64_t>();
  return all;
}

TEST_F(ContextParallel, BytesFallWithTheRanksAndNothingIsSolvedTwice) {
  const Geometry geometry{16, 4};
  const int64_t length = 4 + 16 * 8 * size_;  // eight blocks for each process
  config_.max_position_embeddings = length;
  const Mesh m = mesh({1, 1, size_});
  const Text text = random_text(config_, 1, length);
  const auto of = [&](const std::shared_ptr<RankPolicy>& policy, const Group& cp) {
    const auto attention = controller(policy, geometry, Group(), cp);
    CausalLM split(config_, Group(), attention);
    set_weights(split, random_weights(config_, 1), Group());
    return statistics_of(split, *attention, text, cp);
  };
  RankTable table(2, 3, 8, {4, 8});
  const auto policy = std::shared_ptr<RankPolicy>(make_table_policy(table, "table"));
  const AttentionStatistics low = of(policy, m.cp()), exact = of(make_exact_policy(), m.cp()),
                            alone = of(policy, Group());
  EXPECT_EQ(low.context_exact_bytes, exact.context_bytes);
  EXPECT_EQ(exact.context_exact_bytes, exact.context_bytes);
  const double share = static_cast<double>(low.context_bytes) /
                       static_cast<double>(exact.context_bytes);
  EXPECT_NEAR(share, (4 + 8) / 32.0, 0.05 * (4 + 8) / 32.0);
  // Ring attention passes keys and values of every token to all others: 2 layers, 3 groups, 2 d
  // floats a token.
  const double ring = static_cast<double>((size_ - 1) * length) * 2 * 3 * 2 * 16 * sizeof(float);
  if ((size_ & (size_ - 1)) == 0) {  // chunks are nodes of the tree
    EXPECT_NEAR(static_cast<double>(exact.context_bytes) / ring, 1.0, 0.05);
  } else {
    EXPECT_LT(static_cast<double>(exact.context_bytes) / ring, 2.0);
  }
  EXPECT_EQ(alone.context_bytes, 0);
  EXPECT_NEAR(low.flops, alone.flops, 0.02 * alone.flops);  // the Gram of W_O is made everywhere
  EXPECT_NEAR(low.exact_flops, alone.exact_flops, 1e-9 * alone.exact_flops);
  EXPECT_EQ(low.decompositions, alone.decompositions);
}

TEST_F(ContextParallel, BasesThatProcessesShareAreEqualBitForBit) {
  const Mesh m = mesh({1, 1, size_});
  const int64_t length = kUpdated.length;
  const auto attention = controller(policies().back(), kUpdated.geometry, Group(), m.cp());
  const at::Tensor positions = attention->split(length);
  auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
  const auto random = [&](int64_t heads) {
    return at::randn({2, heads, length, 16}, generator, at::kFloat).index_select(2, positions);
  };
  const at::Tensor q = random(6), k = random(3), v = random(3),
                   w_o = at::randn({40, 96}, generator, at::kFloat);
  std::shared_ptr<LayerPlan> plan;
  attention->attend(0, q, k, v, w_o, plan);
  int64_t shared = 0;
  for (const ContextPart& part : plan->context->parts) {
    for (const auto field : {&ContextPart::p_k, &ContextPart::p_v, &ContextPart::p_q,
                             &ContextPart::p_o, &ContextPart::residual}) {
      const bool score = field == &ContextPart::p_k || field == &ContextPart::p_q ||
                         field == &ContextPart::residual;
      const int64_t columns = field == &ContextPart::residual ? 16
                              : score                         ? part.ranks.qk
                                                              : part.ranks.v;
      const at::Tensor mine = part.*field;
      at::Tensor least = mine.defined()
                             ? mine.clone()
                             : at::full({static_cast<int64_t>(part.sequences.size()), 16, columns},
                                        INFINITY);
      at::Tensor most = mine.defined() ? mine.clone() : at::full_like(least, -INFINITY);
      at::Tensor holders = at::full({1}, mine.defined() ? 1 : 0, at::kLong);
      m.cp().all_reduce(least, ReduceOp::kMin);
      m.cp().all_reduce(most, ReduceOp::kMax);
      m.cp().all_reduce(holders);
      shared += holders.item<int64_t>() > 1 ? 1 : 0;
      EXPECT_TRUE(holders.item<int64_t>() == 0 || least.equal(most)) << "pair " << part.pair;
    }
  }
  EXPECT_GT(shared, 0);
}

TEST_F(ContextParallel, ProcessesThatDecideOtherwiseAreNamedBeforeAnythingTravels) {
  const Mesh m = mesh({1, 1, size_});
  const Text text = random_text(config_, 1, kSolved.length);
  CausalLM split = model(make_fixed_policy(m.cp().rank() == 1 ? 4 : 8, 16), kSolved.geometry,
                         Group(), m.cp());
  std::vector<std::string> named = {"'cp'", "do not agree on rank decisions"};
  if (size_ > 2) {
    named.push_back("rank 1");  // the odd one out
  }
  expect_error(ErrorKind::kCommunication, named, [&] { split.loss(text.tokens, text.labels); });

  // What was decided counts, too, not only what a policy says of itself: here one process forgets
  // it.
  const auto attention = controller(make_fixed_policy(8, 16), kSolved.geometry, Group(), m.cp());
  const int64_t rows = attention->split(kSolved.length).numel();
  std::shared_ptr<LayerPlan> plan;
  attention->attend(0, at::randn({1, 6, rows, 16}), at::randn({1, 3, rows, 16}),
                    at::randn({1, 3, rows, 16}), at::randn({40, 96}), plan);
  EXPECT_NO_THROW(attention->split(kSolved.length));
  if (m.cp().rank() == 1) {
    attention->take_decisions_digest();
  }
  expect_error(ErrorKind::kCommunication, named, [&] { attention->split(kSolved.length); });
}

TEST_F(ContextParallel, RefusesWhatItCannotSplit) {
  const Mesh m = mesh({1, 1, size_});
  CausalLM split = model(make_exact_policy(), {8, 2}, Group(), m.cp());
  const int64_t blocks = 2 * size_ - 1;
  const Text text = random_text(config_, 1, 2 + 8 * blocks);
  expect_error(ErrorKind::kUsage,
               {c10::str(blocks, " blocks of 8"), c10::str("at least ", 2 * size_),
                c10::str(size_, " processes")},
               [&] { split.loss(text.tokens, text.labels); });
  expect_error(ErrorKind::kUsage, {"policy that looks at Grams", "energy"},
               [&] { controller(make_energy_policy(0.9, {8, 16}), {8, 2}, Group(), m.cp()); });
  RankTable gated(2, 3, 8, {4, 8, 0.1F});
  CausalLM gates = model(std::shared_ptr<RankPolicy>(make_table_policy(gated, "gated")),
                         kSolved.geometry, Group(), m.cp());
  const Text longer = random_text(config_, 1, kSolved.length);
  expect_error(ErrorKind::kUsage, {"no gates", "gated"},
               [&] { gates.loss(longer.tokens, longer.labels); });
  expect_error(ErrorKind::kUsage, {"cache"}, [&] { split.make_cache(40); });
}

}  // namespace
}  // namespace drrl::test
