#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include "models/causal_lm/config.h"
#include "policy/calibration/calibration.h"
#include "tests/models/training/training_fixture.h"

namespace drrl {

inline constexpr int64_t kSeqLen = 257, kGroups = 3, kHeadDim = 8;
inline constexpr Geometry kGeometry{32, 1};

inline ModelConfig config() {
  return ModelConfig::parse(R"({
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, )"
                            R"("hidden_size": 48, "intermediate_size": 56,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, )"
                            R"("max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu", )"
                            R"("initializer_range": 0.2})",
                            "tiny");
}

/// Of that model, made up.
inline Calibration calibration() {
  Calibration c;
  c.geometry = kGeometry;
  c.seq_len = kSeqLen;
  c.tokens = 1000;
  c.ranks = {2, 4, 6};
  auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
  c.damage = at::tensor({8.0, 2.0, 0.5}, at::kDouble) *
             (1 + at::rand({2, kGroups, 2, 3, 1}, generator, at::kDouble)) * 1e-4;
  c.bases = std::get<0>(
      at::linalg_qr(at::randn({2, kGroups, 2, kHeadDim, kHeadDim}, generator, at::kFloat)));
  return c;
}

/// Training runs of a tiny random Llama with that calibration, on random words.
class CalibratedTraining : public TrainingTest {
 protected:
  void SetUp() override {
    MpiTest::SetUp();
    if (HasFatalFailure()) {
      return;
    }
    auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
    const at::Tensor words = at::randint(61, {12000}, generator, at::kLong);
    prepare({words.const_data_ptr<int64_t>(), words.const_data_ptr<int64_t>() + words.numel()},
            11000, kSeqLen);
  }
};

}  // namespace drrl
