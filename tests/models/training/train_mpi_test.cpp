// Whole training runs of a tiny random Llama, on 1 to 4 ranks.
#include <cmath>
#include <map>

#include <ATen/CPUGeneratorImpl.h>
#include <mpi.h>
#include <nlohmann/json.hpp>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "core/io/safetensors.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/replicas.h"
#include "models/causal_lm/tensor_parallel.h"
#include "models/training/gradient_reducer.h"
#include "models/training/trainer.h"
#include "models/training/training_state.h"
#include "policy/attention/lowrank_controller.h"
#include "tests/models/training/training_fixture.h"
#include "tests/support/io_support.h"
#include "tests/support/strict_nccl.h"

namespace drrl {
namespace {

constexpr int64_t kSeqLen = 24;
constexpr int64_t kVocabulary = 61;
constexpr int64_t kKvHeads = 3;

ModelConfig tiny_config() {
  return ModelConfig::parse(R"({
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, )"
                            R"("hidden_size": 48, "intermediate_size": 56,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, )"
                            R"("max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu", )"
                            R"("initializer_range": 0.05})",
                            "tiny");
}

// For tiny_config(): on four tensor-parallel ranks the first two share a KV head, and have one of
// its query heads each.
Mesh mesh_of(int64_t tp, int64_t dp, int64_t cp = 1) {
  return make_mesh(tp, dp, cp, kKvHeads);
}

class Training : public TrainingTest {
 protected:
  void SetUp() override {
    MpiTest::SetUp();
    if (HasFatalFailure()) {
      return;
    }
    std::vector<int64_t> document;
    for (int64_t i = 0; i < 3000; ++i) {
      document.push_back((i % 3 == 0 ? 2 * i : i) % 13);  // predictable, and few of the words
    }
    prepare(document, 2600, kSeqLen);
  }

  TrainerOptions options(int64_t steps = 10) const {
    TrainerOptions o;
    o.micro_batch = 2;
    o.global_batch = 8;
    o.steps = steps;
    o.clip = 0.5;
    o.schedule = {.lr = 1e-2,
                  .min_lr = 1e-3,
                  .warmup_tokens = 2 * 8 * kSeqLen,
                  .total_tokens = 10 * 8 * kSeqLen};
    o.fingerprint = {{"lr", "1e-2"}};
    return o;
  }

  struct Outcome {
    TrainResult result;
    std::vector<double> losses, norms;
    std::unique_ptr<CausalLM> model;
  };

  Outcome train(const Mesh& mesh, const TrainerOptions& o, TrainerCallbacks callbacks = {},
                const ModelOptions& model_options = {},
                std::shared_ptr<const SequenceDataset> validation = nullptr) {
    Outcome outcome;
    outcome.model = std::make_unique<CausalLM>(tiny_config(), mesh.tp(),
                                               low_rank_ ? low_rank(mesh) : make_exact_attention(),
                                               model_options);
    outcome.model->initialize(5);
    callbacks.on_step = [&](const StepReport& report) {
      outcome.losses.push_back(report.loss);
      outcome.norms.push_back(report.grad_norm);
    };
    Trainer trainer(o, *outcome.model, mesh, train_, std::move(validation), {}, callbacks);
    outcome.result = trainer.run();
    return outcome;
  }

  /// From now on low-rank attention on sequences of twelve blocks and a short one, of words without
  /// a pattern: where a text repeats itself, some of a block's directions are rounding, and
  /// training amplifies what they are.
  void use_low_rank() {
    if (rank_ == 0) {
      auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
      const at::Tensor words = at::randint(kVocabulary, {4000}, generator, at::kLong);
      write_token_file(folder_ / "noise", {{words.const_data_ptr<int64_t>(),
                                            words.const_data_ptr<int64_t>() + words.numel()}});
    }
    MPI_Barrier(MPI_COMM_WORLD);
    const auto file = std::make_shared<const TokenFile>(TokenFile::open(folder_ / "noise"));
    train_ = std::make_shared<SequenceDataset>(file, 0, 3500, 100, 11);
    valid_ = std::make_shared<SequenceDataset>(file, 3500, 4000, 100, 11);
    low_rank_ = true;
  }

  /// Far pairs at ranks of their own for each layer, group and level, sequences split over the
  /// mesh's cp.
  static std::shared_ptr<AttentionController> low_rank(const Mesh& mesh) {
    RankTable table(2, 3, 4, {2, 4});
    table.at(0, 1, 0) = {8, 2};
    table.at(0, 2, 1) = {4, 8};
    table.at(1, 0, 2) = {8, 8};
    const int64_t first_group = kv_heads_of(kKvHeads, mesh.tp().size(), mesh.tp().rank()).begin;
    return std::make_shared<LowRankController>(make_table_policy(table, "table"), Geometry{8, 1},
                                               BasisOptions{}, first_group, GuardOptions{},
                                               mesh.cp(), mesh.kv());
  }

  /// The whole model's weights by Hugging Face name, on every rank.
  std::map<std::string, at::Tensor> weights(const Outcome& outcome, const Mesh& mesh,
                                            const std::string& name) const {
    const auto folder = folder_ / (mesh.world().size() == 1 ? name + std::to_string(rank_) : name);
    if (mesh.data().rank() == 0) {
      outcome.model->save(folder);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    const SafetensorsFile file(folder / "model.safetensors");
    std::map<std::string, at::Tensor> tensors;
    for (const auto& [tensor, entry] : file.entries()) {
      tensors[tensor] = file.tensor(tensor);
    }
    return tensors;
  }

  /// `mesh`'s run must give the single process's losses, norms and weights.
  void expect_equal_runs(const Mesh& mesh, const TrainerOptions& o, double tolerance) {
    const Outcome alone = train(Mesh(), o);
    const Outcome together = train(mesh, o);
    if (rank_ == 0) {
      ASSERT_EQ(together.losses.size(), static_cast<size_t>(o.steps));
      for (size_t i = 0; i < together.losses.size(); ++i) {
        EXPECT_NEAR(together.losses[i], alone.losses[i], tolerance * alone.losses[i])
            << "step " << i + 1;
        EXPECT_NEAR(together.norms[i], alone.norms[i], 10 * tolerance * alone.norms[i])
            << "step " << i + 1;
      }
    }
    EXPECT_NEAR(together.result.last_loss, alone.result.last_loss,
                tolerance * alone.result.last_loss)
        << "the same on every rank";
    const auto expected = weights(alone, Mesh(), "alone");
    const auto got = weights(together, mesh, "together");
    ASSERT_EQ(got.size(), expected.size());
    for (const auto& [name, tensor] : expected) {
      EXPECT_TRUE(at::allclose(got.at(name), tensor, 1e-3, 2e-4))
          << name << ": " << (got.at(name) - tensor).abs().max().item<float>();
    }
  }

  bool low_rank_ = false;
};

std::vector<nlohmann::json> logged(const std::filesystem::path& output) {
  std::vector<nlohmann::json> rows;
  std::ifstream file(output / "metrics" / "metrics.jsonl");
  for (std::string line; std::getline(file, line);) {
    rows.push_back(nlohmann::json::parse(line));
  }
  return rows;
}

bool bit_equal(const CausalLM& a, const CausalLM& b) {
  for (size_t i = 0; i < a.parameters().size(); ++i) {
    if (!at::equal(a.parameters()[i].value, b.parameters()[i].value)) {
      return false;
    }
  }
  return true;
}

TEST_F(Training, TenStepsLearn) {
  const Mesh mesh = mesh_of(1, size_);
  TrainerOptions o = options();
  const Outcome outcome = train(mesh, o, {}, {}, valid_);
  EXPECT_LT(outcome.result.last_loss, outcome.result.first_loss - 0.3);
  EXPECT_LT(outcome.result.valid_loss_after, outcome.result.valid_loss_before - 0.2);
  EXPECT_NEAR(outcome.result.valid_loss_before, std::log(static_cast<double>(kVocabulary)), 0.2);
  EXPECT_EQ(outcome.result.tokens, 10 * 8 * kSeqLen);
}

TEST_F(Training, DataParallelEqualsOneProcess) {
  expect_equal_runs(mesh_of(1, size_), options(),
                    1e-5);  // on 3 ranks the shares are 3, 3 and 2 sequences
}

TEST_F(Training, UnevenSharesOfASmallBatch) {
  TrainerOptions o = options(4);
  o.micro_batch = 1;
  o.global_batch = size_ + 1;  // the first rank has two microbatches, the others one
  expect_equal_runs(mesh_of(1, size_), o, 1e-5);
}

TEST_F(Training, TensorParallelEqualsOneProcess) {
  expect_equal_runs(mesh_of(size_, 1), options(), 1e-5);
  use_low_rank();
  expect_equal_runs(mesh_of(size_, 1), options(), 1e-5);
}

TEST_F(Training, TensorTimesDataParallelEqualsOneProcess) {
  if (size_ != 4) {
    return;
  }
  expect_equal_runs(mesh_of(2, 2), options(), 1e-5);
}

TEST_F(Training, ContextParallelEqualsOneProcess) {
  use_low_rank();
  TrainerOptions o = options();
  o.global_batch = 4;
  std::map<int, std::vector<MeshShape>> shapes = {
      {2, {{1, 1, 2}}}, {3, {{1, 1, 3}}}, {4, {{2, 1, 2}, {1, 2, 2}}}};
  for (const MeshShape& shape : shapes[size_]) {
    SCOPED_TRACE(c10::str("tp ", shape.tp, ", dp ", shape.dp, ", cp ", shape.cp));
    expect_equal_runs(mesh_of(shape.tp, shape.dp, shape.cp), o, 1e-5);
  }
}

// All layouts of this many processes, with far pairs, validation and checkpoints.
TEST_F(Training, KeepsNcclsRulesAndEndsOnAnyErrorOfIt) {
  use_low_rank();
  std::map<int, std::vector<MeshShape>> shapes = {
      {2, {{2, 1, 1}, {1, 2, 1}, {1, 1, 2}}},
      {3, {{3, 1, 1}}},
      {4, {{4, 1, 1}, {2, 2, 1}, {2, 1, 2}, {1, 2, 2}}}};
  for (const MeshShape& shape : shapes[size_]) {
    SCOPED_TRACE(c10::str("tp ", shape.tp, ", dp ", shape.dp, ", cp ", shape.cp));
    const Mesh inner = mesh_of(shape.tp, shape.dp, shape.cp);
    TrainerOptions o = options(1);
    o.global_batch = 4;
    o.eval_tokens = 200;
    int64_t calls = 0;  // of a whole run
    const auto journal_of = [&](int64_t fail_at, bool in_wait, std::string& error) {
      const auto journal = std::make_shared<Journal>();
      // All processes must fail alike, and those that share a KV head have calls that the others do
      // not have.
      journal->fail_members = shape.tp > kKvHeads ? static_cast<size_t>(size_) : 0;
      o.output = folder_ / c10::str("strict", shape.tp, shape.dp, shape.cp, fail_at, in_wait);
      const Mesh mesh = over_strict_nccl(inner, journal);
      const int64_t of_mesh = journal->counted;
      journal->fail_at = fail_at < 0 ? -1 : of_mesh + fail_at;
      journal->fail_in_wait = in_wait;
      try {
        train(mesh, o, {}, {.activation_checkpoint = true}, valid_);
      } catch (const Error& caught) {
        EXPECT_EQ(caught.kind(), ErrorKind::kCommunication);
        error = caught.what();
      }
      calls = std::max(calls, journal->counted - of_mesh);
      MPI_Barrier(MPI_COMM_WORLD);
      return journal;
    };
    std::string error;
    const auto journal = journal_of(-1, false, error);
    EXPECT_EQ(error, "");
    expect_nccls_rules_kept(*journal);
    for (const bool in_wait : {false, true}) {
      for (int64_t call = 0; call < calls; call += std::max<int64_t>(1, calls / 20)) {
        SCOPED_TRACE(c10::str("call ", call, " of ", calls, in_wait ? ", in wait" : ""));
        error.clear();
        journal_of(call, in_wait, error);
        EXPECT_NE(error.find(c10::str("world rank ", rank_, ", group '")), std::string::npos)
            << error;
        EXPECT_NE(
            error.find(in_wait ? "failed: NCCL communicator was aborted" : "failed: NCCL error"),
            std::string::npos)
            << error;
      }
    }
  }
}

// Some processes alone make calls in the group of a KV head that they share: an error there ends
// them at once, and the others when they have waited for them.
TEST_F(Training, AnErrorThatOnlySharersOfAKvHeadHaveEndsAllProcesses) {
  if (size_ != kKvHeads + 1) {
    return;
  }
  use_low_rank();
  const bool shares = rank_ < 2;  // of four processes and three heads
  for (const auto& [call, in_wait] :
       {std::pair(0, false), {5, true}}) {  // agreement before the first pass, and one within it
    SCOPED_TRACE(c10::str("call ", call, in_wait ? ", in wait" : ""));
    const auto journal = std::make_shared<Journal>();
    const Mesh mesh = over_strict_nccl(
        Mesh::create(Environment::detect(), {.tp = size_, .kv_heads = kKvHeads}, at::kCPU,
                     std::chrono::seconds(3)),
        journal);
    ASSERT_EQ(mesh.kv().size(), shares ? 2 : 1);
    journal->fail_members = 2;
    journal->fail_at = journal->counted + call;
    journal->fail_in_wait = in_wait;
    const std::string error = error_of(ErrorKind::kCommunication, [&] { train(mesh, options(1)); });
    EXPECT_NE(error.find(!shares   ? "did not complete within 3000 ms"
                         : in_wait ? "failed: NCCL communicator was aborted"
                                   : "failed: NCCL error"),
              std::string::npos)
        << error;
    EXPECT_NE(error.find(c10::str("world rank ", rank_, ", group '", shares ? "kv" : "")),
              std::string::npos)
        << error;
    MPI_Barrier(MPI_COMM_WORLD);
  }
}

TEST_F(Training, ContextParallelValidatesAndResumes) {
  if (size_ == 1 || size_ == 3) {
    return;
  }
  use_low_rank();
  const Mesh mesh = mesh_of(1, size_ / 2, 2);
  TrainerOptions whole = options(4);
  const Outcome alone = train(Mesh(), whole, {}, {}, valid_);
  whole.output = folder_ / "whole";
  const Outcome uninterrupted = train(mesh, whole, {}, {}, valid_);
  EXPECT_NEAR(uninterrupted.result.valid_loss_before, alone.result.valid_loss_before, 1e-6);
  EXPECT_NEAR(uninterrupted.result.valid_loss_after, alone.result.valid_loss_after, 1e-5);
  TrainerOptions parts = options(4);
  parts.output = folder_ / "parts";
  parts.resume = true;
  int64_t steps = 0;
  TrainerCallbacks callbacks;
  callbacks.stop_requested = [&] { return ++steps == 2; };
  EXPECT_TRUE(train(mesh, parts, callbacks).result.interrupted);
  const Outcome rest = train(mesh, parts);
  EXPECT_EQ(rest.result.steps_this_run, 2);
  EXPECT_TRUE(bit_equal(*uninterrupted.model, *rest.model));
  low_rank_ = false;
  test::expect_error(ErrorKind::kUsage, {"over 1 processes, the mesh over 2"},
                     [&] { train(mesh, options()); });
}

TEST_F(Training, AccumulationEqualsABiggerMicrobatch) {
  const Mesh mesh = mesh_of(1, size_);
  TrainerOptions small = options();
  small.micro_batch = 1;
  TrainerOptions big = options();
  big.micro_batch = 8;
  const Outcome a = train(mesh, small);
  const Outcome b = train(mesh, big);
  for (size_t i = 0; i < a.losses.size(); ++i) {
    EXPECT_NEAR(a.losses[i], b.losses[i], 1e-5 * b.losses[i]);
  }
  EXPECT_NEAR(a.result.last_loss, b.result.last_loss, 1e-5 * b.result.last_loss);
}

TEST_F(Training, ActivationCheckpointsChangeNoBit) {
  const Mesh mesh = mesh_of(1, size_);
  const Outcome plain = train(mesh, options(3));
  const Outcome recomputed = train(mesh, options(3), {}, {.activation_checkpoint = true});
  EXPECT_TRUE(bit_equal(*plain.model, *recomputed.model));
}

TEST_F(Training, BucketsAreSentDuringTheBackwardPass) {
  if (size_ == 1) {
    return;
  }
  const Mesh mesh = mesh_of(1, size_);
  CausalLM model(tiny_config(), mesh.tp(), make_exact_attention());
  model.initialize(5);
  GradientReducer reducer(model.parameters(), mesh.dp(), {}, 8 << 10);
  EXPECT_GT(reducer.bucket_count(), 3);
  reducer.begin();
  std::vector<int64_t> sent;
  model.on_gradients_complete([&](int64_t first) {
    reducer.complete_from(first);
    sent.push_back(reducer.sent());
  });
  const Batch batch = train_->samples(rank_, 1);
  model.loss(batch.tokens, batch.labels).loss_sum.backward();
  ASSERT_EQ(sent.size(), 2U) << "once a layer";
  EXPECT_GT(sent[0], 0);
  EXPECT_GT(sent[1], sent[0]);
  EXPECT_LT(sent[1], reducer.bucket_count()) << "the embedding is not complete yet";
  EXPECT_TRUE(reducer.finish());

  // The same sum without buckets.
  CausalLM plain(tiny_config(), Group(), make_exact_attention());
  plain.initialize(5);
  const Batch all = train_->samples(0, size_);
  plain.loss(all.tokens, all.labels).loss_sum.backward();
  for (size_t i = 0; i < plain.parameters().size(); ++i) {
    EXPECT_TRUE(at::allclose(model.parameters()[i].value.grad(), plain.parameters()[i].value.grad(),
                             1e-4, 1e-4))
        << plain.parameters()[i].name;
  }
}

TEST_F(Training, AResumedRunIsBitForBitTheUninterruptedOne) {
  const int64_t tp = size_ == 4 || size_ == 2 ? 2 : 1;
  const Mesh mesh = mesh_of(tp, size_ / tp);
  TrainerOptions whole = options();
  whole.output = folder_ / "whole";
  const Outcome uninterrupted = train(mesh, whole);

  TrainerOptions parts = options();
  parts.output = folder_ / "parts";
  parts.save_every = 3;
  parts.resume = true;
  // Stopped by a signal during step 5 on the last rank only: every rank saves after it.
  int64_t steps = 0;
  TrainerCallbacks callbacks;
  callbacks.stop_requested = [&] { return ++steps == 5 && rank_ == size_ - 1; };
  const Outcome first = train(mesh, parts, callbacks);
  EXPECT_TRUE(first.result.interrupted);
  EXPECT_EQ(first.result.steps, 5);
  EXPECT_EQ(first.result.checkpoint.filename(), "step-00000005");

  const Outcome second = train(mesh, parts);
  EXPECT_FALSE(second.result.interrupted);
  EXPECT_EQ(second.result.steps, 10);
  EXPECT_EQ(second.result.steps_this_run, 5);
  EXPECT_TRUE(bit_equal(*uninterrupted.model, *second.model));
  if (rank_ == 0) {
    const auto expected = logged(whole.output);
    const auto got = logged(parts.output);
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
      for (const char* key : {"step", "loss", "grad_norm", "lr", "tokens"}) {
        EXPECT_EQ(got[i][key], expected[i][key]) << "row " << i << " " << key;
      }
    }
  }

  // Nothing is left to do.
  const Outcome third = train(mesh, parts);
  EXPECT_EQ(third.result.steps_this_run, 0);
  EXPECT_TRUE(bit_equal(*second.model, *third.model));
}

TEST_F(Training, ACheckpointOfAnotherRunIsRefused) {
  const Mesh mesh = mesh_of(1, size_);
  TrainerOptions o = options(2);
  o.output = folder_ / "run";
  train(mesh, o);
  test::expect_error(ErrorKind::kUsage, {"already holds checkpoints"}, [&] { train(mesh, o); });
  o.resume = true;
  o.fingerprint = {{"lr", "2e-2"}};
  test::expect_error(ErrorKind::kCheckpoint, {"lr: 1e-2 -> 2e-2"}, [&] { train(mesh, o); });
  o.resume_override = true;
  o.steps = 3;
  EXPECT_EQ(train(mesh, o).result.steps_this_run, 1);
}

// Folders of one name on machines that share none.
TEST_F(Training, AllRanksResumeOneCheckpoint) {
  if (size_ == 1) {
    return;
  }
  const auto before = std::filesystem::current_path();
  std::filesystem::create_directories(folder_ / std::to_string(rank_));
  std::filesystem::current_path(folder_ / std::to_string(rank_));
  TrainerOptions o = options(2);
  o.schedule.lr *= rank_ + 1;
  o.output = "out";
  train(Mesh(), o);
  o.schedule.lr = 1e-2;
  o.resume = true;
  test::expect_error(
      ErrorKind::kCheckpoint,
      {"need the same checkpoint", "out/checkpoints/step-00000002) on rank 0", "on rank 1"},
      [&] { train(mesh_of(1, size_), o); });
  std::filesystem::current_path(before);
}

TEST_F(Training, WeightsOfReplicasMustBeEqual) {
  const auto error_with = [&](const Mesh& mesh, int rank, const std::string& name) {
    CausalLM model(tiny_config(), mesh.tp(), make_exact_attention());
    model.initialize(5);
    check_replicas(model, mesh);
    const at::NoGradGuard no_grad;
    for (Parameter& parameter : model.parameters()) {
      if (rank_ == rank && parameter.name == name) {
        parameter.value.flatten()[-1].add_(1e-3);
      }
    }
    return error_of(ErrorKind::kCommunication, [&] { check_replicas(model, mesh); });
  };
  if (size_ == 1) {
    CausalLM model(tiny_config(), Group(), make_exact_attention());
    check_replicas(model, Mesh());
    return;
  }
  const std::string norm = "model.norm.weight", down = "model.layers.1.mlp.down_proj.weight",
                    last = c10::str("on rank ", size_ - 1);
  EXPECT_THAT(error_with(mesh_of(1, size_), size_ - 1, down),
              testing::AllOf(testing::HasSubstr("the checksum of tensor-parallel shard 0 is "),
                             testing::HasSubstr(last)));
  EXPECT_THAT(error_with(mesh_of(1, 1, size_), size_ - 1, norm),
              testing::AllOf(testing::HasSubstr("the checksum of what is not sharded is "),
                             testing::HasSubstr(last)));
  EXPECT_THAT(error_with(mesh_of(size_, 1), size_ - 1, norm),
              testing::AllOf(testing::HasSubstr("not sharded"), testing::HasSubstr(last)));
  if (size_ == 4) {
    EXPECT_THAT(error_with(mesh_of(2, 2), 3, down),
                testing::AllOf(testing::HasSubstr("shard 1 is "), testing::HasSubstr("on rank 1, "),
                               testing::HasSubstr("on rank 3")));
    EXPECT_THAT(error_with(mesh_of(4, 1), 1, "model.layers.0.self_attn.qkv_proj.weight"),
                testing::AllOf(testing::HasSubstr("KV head 0 is "),
                               testing::HasSubstr("on rank 0, "), testing::HasSubstr("on rank 1")));
  }
}

TEST_F(Training, ADamagedCheckpointFallsBackToTheOneBefore) {
  const Mesh mesh = mesh_of(1, size_);
  TrainerOptions o = options(4);
  o.output = folder_ / "run";
  o.save_every = 2;
  train(mesh, o);
  if (rank_ == 0) {
    const auto shard = o.output / "checkpoints" / "step-00000004" / "shard-tp0.safetensors";
    std::string bytes = test::read_bytes(shard);
    bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
    test::write_bytes(shard, bytes);
  }
  MPI_Barrier(MPI_COMM_WORLD);
  o.resume = true;
  std::string warning;
  TrainerCallbacks callbacks;
  callbacks.on_warning = [&](const std::string& text) { warning += text; };
  EXPECT_EQ(train(mesh, o, callbacks).result.steps_this_run, 2);
  if (rank_ == 0) {
    EXPECT_NE(warning.find("shard-tp0.safetensors"), std::string::npos) << warning;
  }
}

TEST_F(Training, ResumesOnAnotherLayout) {
  // From and to every layout of this world and the single process; three KV groups on two ranks are
  // 2 + 1, on four two ranks hold the first one.
  std::vector<MeshShape> shapes = {{1, 1}};
  if (size_ > 1) {
    shapes.push_back({1, size_});
  }
  if (size_ == 2 || size_ == 3) {
    shapes.push_back({size_, 1});
  } else if (size_ == 4) {
    shapes.push_back({2, 2});
    shapes.push_back({4, 1});
  }
  const TrainerOptions whole = options();
  const Outcome uninterrupted = train(Mesh(), whole);
  // Of the world `shape`, the processes that take part; the others wait.
  const auto run = [&](MeshShape shape, const TrainerOptions& o,
                       const TrainerCallbacks& callbacks) {
    std::optional<Outcome> outcome;
    if (shape.tp * shape.dp > 1 || rank_ == 0) {
      outcome = train(mesh_of(shape.tp, shape.dp), o, callbacks);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    return outcome;
  };
  for (const MeshShape from : shapes) {
    for (const MeshShape to : shapes) {
      const std::string name = c10::str("tp", from.tp, "dp", from.dp, "-tp", to.tp, "dp", to.dp);
      SCOPED_TRACE(name);
      TrainerOptions o = whole;
      o.output = folder_ / name;
      o.resume = true;
      int64_t steps = 0;
      TrainerCallbacks callbacks;
      callbacks.stop_requested = [&] { return ++steps == 4; };
      run(from, o, callbacks);
      std::string warning;
      callbacks = {};
      callbacks.on_warning = [&](const std::string& text) { warning += text; };
      const auto rest = run(to, o, callbacks);
      if (!rest) {
        continue;
      }
      EXPECT_EQ(rest->result.steps_this_run, 6);
      EXPECT_NEAR(rest->result.last_loss, uninterrupted.result.last_loss,
                  1e-5 * uninterrupted.result.last_loss);
      const bool same = from.tp == to.tp && from.dp == to.dp;
      EXPECT_EQ(warning.empty(), same || rank_ != 0) << warning;
      if (from.tp * from.dp == 1 && same) {
        EXPECT_TRUE(bit_equal(*uninterrupted.model, *rest->model));
      }
    }
  }
}

/// Resharding alone, without a step whose rounding could hide anything: weights and moments go from
/// a layout to another and back.
TEST_F(Training, AReshardedStateIsBitForBitTheOld) {
  if (size_ > 3 || size_ == 1) {
    return;
  }
  TrainerOptions o = options(4);
  const auto checkpoint = [&](const std::string& name) {
    return SafetensorsFile(folder_ / name / "checkpoints/step-00000004/shard-tp0.safetensors");
  };
  o.output = folder_ / "one";
  if (rank_ == 0) {
    train(Mesh(), o);
  }
  MPI_Barrier(MPI_COMM_WORLD);
  const auto copy_through = [&](const std::string& from, const std::string& to, const Mesh& mesh) {
    CausalLM model(tiny_config(), mesh.tp(), make_exact_attention());
    model.initialize(6);
    AdamW optimizer(model.parameters(), {});
    const StepObservers observers;
    const TrainingState state{model, optimizer, mesh, observers, o.fingerprint};
    const auto position = restore_training_state(folder_ / from / "checkpoints", state, false, {});
    ASSERT_TRUE(position.has_value());
    save_training_state(folder_ / to / "checkpoints", state, *position, 0);
  };
  copy_through("one", "split", mesh_of(size_, 1));
  MPI_Barrier(MPI_COMM_WORLD);
  if (rank_ == 0) {
    copy_through("split", "back", Mesh());
    const SafetensorsFile before = checkpoint("one");
    const SafetensorsFile after = checkpoint("back");
    EXPECT_GT(before.entries().size(), 30U);
    ASSERT_EQ(before.entries().size(), after.entries().size());
    for (const auto& [name, entry] : before.entries()) {
      EXPECT_TRUE(at::equal(before.tensor(name), after.tensor(name))) << name;
    }
    EXPECT_LT(checkpoint("split").entry("model.model.layers.0.mlp.down_proj.weight").bytes,
              before.entry("model.model.layers.0.mlp.down_proj.weight").bytes);
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

/// Has a state and remembers what it loads.
class Remembering final : public StepObserver {
 public:
  Remembering(std::string name, std::string state)
      : name_(std::move(name)), state_(std::move(state)) {}
  std::string state_name() const override { return name_; }
  std::string save() override { return state_; }
  void load(const std::string& state) override { loaded = state; }

  std::string loaded;

 private:
  std::string name_, state_;
};

/// Makes of a checkpoint of one process what version 1 wrote.
void to_version_1(const std::filesystem::path& folder) {
  const auto rename = [&](nlohmann::json& files, const std::string& name, const std::string& text) {
    const std::string old = "rank-tp0-dp0.policy";
    files.erase(name);
    files[old] = {{"bytes", text.size()},
                  {"xxh3", to_hex(XXH3_64bits(text.data(), text.size()))},
                  {"rank", 0}};
    std::filesystem::remove(folder / name);
    test::write_bytes(folder / old, text);
  };
  auto manifest = nlohmann::json::parse(test::read_bytes(folder / "manifest.json"));
  const std::string policy = test::read_bytes(folder / "rank-tp0-dp0.rank-policy"),
                    online = test::read_bytes(folder / "rank-tp0-dp0.online-policy");
  rename(manifest["files"], "rank-tp0-dp0.rank-policy", policy);
  rename(manifest["files"], "rank-tp0-dp0.online-policy", policy + std::string(1, '\0') + online);
  manifest["version"] = 1;
  manifest.erase("manifest_xxh3");
  const std::string text = manifest.dump();
  manifest["manifest_xxh3"] = to_hex(XXH3_64bits(text.data(), text.size()));
  test::write_bytes(folder / "manifest.json", manifest.dump());
}

TEST_F(Training, StatesOfObserversComeBackAlsoFromVersion1) {
  if (size_ > 1) {
    return;
  }
  const auto restored = [&](const TrainerOptions& o) {
    CausalLM model(tiny_config(), Group(), make_exact_attention());
    model.initialize(6);
    AdamW optimizer(model.parameters(), {});
    const auto policy = std::make_shared<Remembering>("rank-policy", ""),
               online = std::make_shared<Remembering>("online-policy", ""),
               other = std::make_shared<Remembering>("other", "");
    const StepObservers observers = {online, policy, other};
    const Mesh mesh;
    const TrainingState state{model, optimizer, mesh, observers, o.fingerprint};
    EXPECT_TRUE(restore_training_state(o.output / "checkpoints", state, false, {}).has_value());
    EXPECT_EQ(other->loaded, "");
    return std::pair(policy->loaded, online->loaded);
  };
  const std::string bytes("a\0b", 3);
  TrainerOptions o = options(2);
  o.output = folder_ / "run";
  o.fingerprint = {{"attention", "exact"}};
  const auto save = [&](const std::string& policy) {
    CausalLM model(tiny_config(), Group(), make_exact_attention());
    model.initialize(5);
    AdamW optimizer(model.parameters(), {});
    const StepObservers observers = {std::make_shared<Remembering>("rank-policy", policy),
                                     std::make_shared<StepObserver>(),
                                     std::make_shared<Remembering>("online-policy", bytes)};
    const Mesh mesh;
    return save_training_state(o.output / "checkpoints",
                               {model, optimizer, mesh, observers, o.fingerprint},
                               {.step = 1, .samples = 4, .tokens = 64}, 0);
  };
  save("ranks: dp");
  EXPECT_EQ(restored(o), std::pair(std::string("ranks: dp"), bytes));
  o.fingerprint = {{"attention", "full"}};
  const auto old = save("blocks, ranks: full, decay");
  to_version_1(old);
  o.fingerprint = {{"attention", "exact"}};
  EXPECT_EQ(restored(o), std::pair(std::string("blocks, ranks: exact, decay"), bytes));
}

TEST_F(Training, WeightsThatBrokeAfterTheStepAreNotSaved) {
  const Mesh mesh = mesh_of(1, size_);
  TrainerOptions o = options(4);
  o.output = folder_ / "run";
  o.save_every = 2;
  CausalLM model(tiny_config(), mesh.tp(), make_exact_attention());
  model.initialize(5);
  TrainerCallbacks callbacks;
  callbacks.on_step =
      [&](const StepReport& report) {  // rank 0, between the update and the checkpoint
        if (report.step == 4) {
          const at::NoGradGuard no_grad;
          model.parameters()[3].value.view({-1})[0].fill_(std::nan(""));
        }
      };
  Trainer trainer(o, model, mesh, train_, nullptr, {}, callbacks);
  test::expect_error(ErrorKind::kNumerics, {"step 4", "weights of world rank 0", "no checkpoint"},
                     [&] { trainer.run(); });
  if (rank_ == 0) {
    EXPECT_EQ(test::read_bytes(o.output / "checkpoints" / "latest"), "step-00000002\n");
  }
}

TEST_F(Training, ANanOnOneRankStopsAllBeforeTheUpdate) {
  for (const bool tensor_parallel : {false, true}) {
    if (tensor_parallel && size_ > 3) {
      continue;
    }
    const Mesh mesh = tensor_parallel ? mesh_of(size_, 1) : mesh_of(1, size_);
    CausalLM model(tiny_config(), mesh.tp(), make_exact_attention());
    model.initialize(5);
    int64_t done = 0;
    std::vector<at::Tensor> before;
    TrainerCallbacks callbacks;
    callbacks.stop_requested = [] { return false; };
    // After the first step, the last rank's copy of a weight breaks.
    callbacks.on_microbatch = [&](int64_t step, int64_t microbatch, int64_t) {
      if (step == 2 && microbatch == 1 && rank_ == size_ - 1) {
        const at::NoGradGuard no_grad;
        model.parameters()[3].value.view({-1})[0].fill_(std::nan(""));
      }
      if (step == 2 && microbatch == 1) {
        for (const Parameter& p : model.parameters()) {
          before.push_back(p.value.detach().clone());
        }
      }
      done = step;
    };
    TrainerOptions o = options();
    o.micro_batch = 1;
    o.global_batch = 2 * mesh.dp().size();
    Trainer trainer(o, model, mesh, train_, nullptr, {}, callbacks);
    const std::string who = tensor_parallel ? "world rank" : c10::str("world rank ", size_ - 1);
    test::expect_error(ErrorKind::kNumerics, {"step 2", who, "before the update"},
                       [&] { trainer.run(); });
    EXPECT_EQ(done, 2);
    ASSERT_FALSE(before.empty());
    for (size_t i = 0; i < before.size(); ++i) {
      EXPECT_TRUE(
          at::equal(before[i].nan_to_num(), model.parameters()[i].value.detach().nan_to_num()))
          << "weights were updated";
    }
  }
}

TEST_F(Training, AFullDiskStopsEveryRankAndKeepsTheOldCheckpoint) {
  const Mesh mesh = mesh_of(1, size_);
  TrainerOptions o = options(2);
  o.output = folder_ / "run";
  train(mesh, o);
  o.steps = 3;
  o.resume = true;
  {
    const test::FileSizeLimit limit(rank_ == 0 ? 4096 : RLIM_INFINITY);
    test::expect_error(ErrorKind::kStorage, {"shard-tp0.safetensors"}, [&] { train(mesh, o); });
  }
  if (rank_ == 0) {
    EXPECT_EQ(test::read_bytes(o.output / "checkpoints" / "latest"), "step-00000002\n");
  }
}

TEST_F(Training, RefusesContradictions) {
  TrainerOptions o = options();
  o.global_batch = size_ - 1;
  const Mesh mesh = mesh_of(1, size_);
  test::expect_error(ErrorKind::kUsage, {"global_batch"}, [&] { train(mesh, o); });
  o = options();
  o.micro_batch = 0;
  test::expect_error(ErrorKind::kUsage, {"micro_batch", "0"}, [&] { train(mesh, o); });
}

}  // namespace
}  // namespace drrl
