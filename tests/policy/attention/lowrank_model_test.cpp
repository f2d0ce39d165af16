// The model under every rank policy, on 1, 2 and 3 tensor-parallel ranks: strictly causal, one
// sequence at a time, the same on every layout, with fewer KV heads than ranks as well, and
// checkpointing changes no bit.
#include "core/error.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/tensor_parallel.h"
#include "policy/attention/lowrank_controller.h"
#include "tests/support/reference_llama.h"
#include "tests/support/tensor_parallel_fixture.h"

namespace drrl::test {
namespace {

constexpr Geometry kGeometry{8, 2};
constexpr int64_t kLength = 61;  // eight blocks, the last one short
constexpr int64_t kLevels = 3;

class LowRankModel : public TensorParallelTest {
 protected:
  CausalLM model(const std::shared_ptr<RankPolicy>& policy, const Group& tp,
                 ModelOptions options = {}) const {
    const int64_t first_group = kv_heads_of(config_.num_key_value_heads, tp.size(), tp.rank())
                                    .begin;
    const Group kv = tp.size() > 1 ? make_kv(config_.num_key_value_heads) : Group();
    CausalLM result(config_, tp,
                    std::make_shared<LowRankController>(policy, kGeometry, BasisOptions{},
                                                        first_group, GuardOptions{}, Group(), kv),
                    options);
    set_weights(result, random_weights(config_, 1), tp);
    return result;
  }

  ModelConfig config_ = small_config();
};

TEST_F(LowRankModel, TheFutureChangesNothingBeforeIt) {
  const Text text = random_text(config_, 2, kLength);
  for (const auto& policy : rank_policies(kLevels)) {
    SCOPED_TRACE(policy->describe());
    CausalLM m = model(policy, tp_);
    const at::Tensor before = m.logits(text.tokens);
    for (const int64_t t : {1, 2, 9, 10, 26, 42, 58, 60}) {
      at::Tensor changed = text.tokens.clone();
      changed.slice(1, t) = (changed.slice(1, t) + 7).remainder(config_.vocab_size);
      const at::Tensor after = m.logits(changed);
      EXPECT_TRUE(before.slice(1, 0, t).equal(after.slice(1, 0, t)))
          << "token " << t << " and later changed an earlier logit";
      EXPECT_FALSE(before.slice(1, t).equal(after.slice(1, t)));
    }
  }
}

TEST_F(LowRankModel, ASequenceDoesNotSeeItsNeighboursInTheBatch) {
  const Text text = random_text(config_, 3, kLength);
  for (const auto& policy : rank_policies(kLevels)) {
    SCOPED_TRACE(policy->describe());
    CausalLM m = model(policy, tp_);
    const at::Tensor together = m.logits(text.tokens);
    for (int64_t i = 0; i < 3; ++i) {
      EXPECT_LE(relative_error(m.logits(text.tokens.narrow(0, i, 1)), together.narrow(0, i, 1)),
                1e-5)
          << "sequence " << i;
    }
  }
}

TEST_F(LowRankModel, LayoutsAgree) {
  // With three query heads to a KV head, which on 3 ranks {0 1 2} share, or {0 1} and {2}, in
  // float64: a word that a block repeats leaves its values a direction that is rounding, and in
  // float32 the gradient along it as well.
  for (const auto& [heads, groups, dtype] :
       {std::tuple(6, 3, at::kFloat), {3, 1, at::kDouble}, {6, 2, at::kDouble}}) {
    config_ = small_config(heads, groups);
    const Text text = random_text(config_, 2, kLength);
    for (const auto& policy : rank_policies(kLevels)) {
      SCOPED_TRACE(c10::str(policy->describe(), ", ", heads, " heads in ", groups));
      const double close = dtype == at::kDouble ? 1e-6 : 1e-5;
      CausalLM alone = model(policy, Group(), {.dtype = dtype});
      CausalLM shared = model(policy, tp_, {.dtype = dtype});
      const at::Tensor expected = alone.loss(text.tokens, text.labels).loss_sum;
      const at::Tensor got = shared.loss(text.tokens, text.labels).loss_sum;
      EXPECT_LE(relative_error(got, expected), close);
      expected.backward();
      got.backward();
      for (size_t i = 0; i < alone.parameters().size(); ++i) {  // those that every rank holds whole
        if (!alone.parameters()[i].sharded) {
          EXPECT_LE(relative_error(shared.parameters()[i].value.grad(),
                                   alone.parameters()[i].value.grad()),
                    10 * close)
              << alone.parameters()[i].name;
        }
      }
    }
  }
}

TEST_F(LowRankModel, LayoutsOfGpt2Agree) {
  config_ = small_gpt2_config();
  const Text text = random_text(config_, 2, kLength);
  for (const auto& policy : rank_policies(kLevels)) {
    SCOPED_TRACE(policy->describe());
    CausalLM alone = model(policy, Group());
    CausalLM shared = model(policy, tp_);
    EXPECT_LE(relative_error(shared.loss(text.tokens, text.labels).loss_sum,
                             alone.loss(text.tokens, text.labels).loss_sum),
              1e-5);
  }
}

TEST_F(LowRankModel, LowRankReallyIsAtWork) {
  const Text text = random_text(config_, 1, kLength);
  CausalLM exact = model(make_exact_policy(), tp_);
  const at::Tensor expected = exact.logits(text.tokens);
  const double coarse = relative_error(model(make_fixed_policy(4, 16), tp_).logits(text.tokens),
                                       expected);
  const double fine = relative_error(model(make_fixed_policy(14, 16), tp_).logits(text.tokens),
                                     expected);
  EXPECT_GT(coarse, 1e-3);
  EXPECT_LT(fine, coarse);
}

TEST_F(LowRankModel, RunsOfOneTokenAreOrdinaryText) {
  for (const int64_t run :
       {kLength, kLength / 2}) {  // with its positions encoded, a token's keys differ; those of
                                  // GPT-2 do so only by what positions add
    for (const bool gpt2 : {false, true}) {
      config_ = gpt2 ? small_gpt2_config() : small_config();
      Text text = random_text(config_, 1, kLength);
      text.tokens.slice(1, 0, run).fill_(3);
      text.labels.slice(1, 0, run - 1).fill_(3);
      const double exact = model(make_exact_policy(), tp_)
                               .loss(text.tokens, text.labels)
                               .loss_sum.item<double>();
      for (const auto& policy : rank_policies(kLevels)) {
        SCOPED_TRACE(c10::str(policy->describe(), ", a run of ", run, gpt2 ? ", GPT-2" : ""));
        CausalLM m = model(policy, tp_);
        const at::Tensor loss = m.loss(text.tokens, text.labels).loss_sum;
        EXPECT_NEAR(loss.item<double>(), exact, 1e-2 * exact);
        loss.backward();
        for (const Parameter& parameter : m.parameters()) {
          EXPECT_TRUE(at::isfinite(parameter.value.grad()).all().item<bool>()) << parameter.name;
        }
      }
    }
  }
}

TEST_F(LowRankModel, CheckpointingChangesNoBit) {
  const Text text = random_text(config_, 2, kLength);
  for (const auto& policy : rank_policies(kLevels)) {
    SCOPED_TRACE(policy->describe());
    CausalLM kept = model(policy, tp_);
    CausalLM recomputed = model(policy, tp_, {.activation_checkpoint = true});
    kept.loss(text.tokens, text.labels).loss_sum.backward();
    recomputed.loss(text.tokens, text.labels).loss_sum.backward();
    for (size_t i = 0; i < kept.parameters().size(); ++i) {
      EXPECT_TRUE(kept.parameters()[i].value.grad().equal(recomputed.parameters()[i].value.grad()))
          << kept.parameters()[i].name;
    }
  }
}

TEST_F(LowRankModel, Bfloat16IsClose) {
  const Text text = random_text(config_, 1, kLength);
  for (const auto& policy : rank_policies(kLevels)) {
    SCOPED_TRACE(policy->describe());
    const at::Tensor single = model(policy, tp_).loss(text.tokens, text.labels).loss_sum;
    const at::Tensor
        half = model(policy, tp_, {.dtype = at::kBFloat16}).loss(text.tokens, text.labels).loss_sum;
    EXPECT_LE(relative_error(half, single), 3e-2);
  }
}

}  // namespace
}  // namespace drrl::test
