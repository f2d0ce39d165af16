// The parts of a training run, one at a time: schedule, optimizer, data order, metrics.
// train_mpi_test.cpp runs them together.
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include <nlohmann/json.hpp>

#include "models/causal_lm/causal_lm.h"
#include "models/data/sequence_dataset.h"
#include "models/training/gradient_reducer.h"
#include "models/training/metrics.h"
#include "models/training/optimizer.h"
#include "models/training/schedule.h"
#include "tests/support/io_support.h"

namespace drrl {
namespace {

using test::expect_error;
using test::read_bytes;
using test::TemporaryDirectory;

TEST(Schedule, WarmsUpThenFollowsACosineInTokens) {
  const CosineSchedule schedule{
      .lr = 1.0, .min_lr = 0.1, .warmup_tokens = 100, .total_tokens = 1100};
  EXPECT_DOUBLE_EQ(schedule.rate(25), 0.25);
  EXPECT_DOUBLE_EQ(schedule.rate(100), 1.0);
  EXPECT_DOUBLE_EQ(schedule.rate(600), 0.55);
  EXPECT_NEAR(schedule.rate(350), 0.1 + 0.9 * 0.5 * (1 + std::sqrt(0.5)), 1e-12);
  EXPECT_DOUBLE_EQ(schedule.rate(1100), 0.1);
  EXPECT_DOUBLE_EQ(schedule.rate(5000), 0.1);
}

TEST(Schedule, RefusesContradictions) {
  expect_error(ErrorKind::kUsage, {"min_lr", "0.2"},
               [] { CosineSchedule{0.1, 0.2, 0, 10}.validate(); });
  expect_error(ErrorKind::kUsage, {"warmup_tokens = 10"},
               [] { CosineSchedule{0.1, 0.0, 10, 10}.validate(); });
  expect_error(ErrorKind::kUsage, {"lr must be positive"},
               [] { CosineSchedule{-1, 0.0, 0, 10}.validate(); });
}

Parameter parameter(const char* name, const at::Tensor& value, bool decay) {
  return {name, value.clone().requires_grad_(true), decay, false};
}

TEST(AdamWTest, FollowsTheFormulaAndDecaysOnlyWhatItShould) {
  at::manual_seed(3);
  std::vector<Parameter> parameters{parameter("matrix", at::randn({5, 7}), true),
                                    parameter("norm", at::randn({33}), false)};
  const AdamW::Options options{.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
  AdamW optimizer(parameters, options);
  std::vector<at::Tensor> w, m, v;
  for (const Parameter& p : parameters) {
    w.push_back(p.value.detach().to(at::kDouble));
    m.push_back(at::zeros_like(w.back()));
    v.push_back(at::zeros_like(w.back()));
  }
  for (int t = 1; t <= 5; ++t) {
    const double lr = 0.01 * t;
    const double scale = t == 3 ? 0.25 : 1.0;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const at::Tensor gradient = at::randn_like(w[i]);
      parameters[i].value.mutable_grad() = gradient.to(at::kFloat);
      const at::Tensor g = gradient.to(at::kFloat).to(at::kDouble) * scale;
      if (parameters[i].decay) {
        w[i] = w[i] * (1 - lr * options.weight_decay);
      }
      m[i] = options.beta1 * m[i] + (1 - options.beta1) * g;
      v[i] = options.beta2 * v[i] + (1 - options.beta2) * g * g;
      w[i] = w[i] - lr * (m[i] / (1 - std::pow(options.beta1, t))) /
                        ((v[i] / (1 - std::pow(options.beta2, t))).sqrt() + options.eps);
    }
    optimizer.step(lr, scale);
    for (size_t i = 0; i < parameters.size(); ++i) {
      EXPECT_TRUE(at::allclose(parameters[i].value.detach().to(at::kDouble), w[i], 1e-5, 1e-6))
          << parameters[i].name << " step " << t;
    }
  }
  EXPECT_EQ(optimizer.steps_taken(), 5);
  const auto state = optimizer.state();
  EXPECT_EQ(state.size(), 5U);
  EXPECT_TRUE(at::allclose(state.at("exp_avg.norm").to(at::kDouble), m[1], 1e-5, 1e-7));
  EXPECT_TRUE(at::allclose(state.at("exp_avg_sq.matrix").to(at::kDouble), v[0], 1e-5, 1e-7));
}

TEST(AdamWTest, RefusesAParameterWithoutGradient) {
  std::vector<Parameter> parameters{parameter("a", at::ones({2}), true)};
  AdamW optimizer(parameters, {});
  expect_error(ErrorKind::kInternal, {"no gradient"}, [&] { optimizer.step(0.1); });
  expect_error(ErrorKind::kUsage, {"beta2", "1.5"}, [&] { AdamW(parameters, {.beta2 = 1.5}); });
}

TEST(Clip, FactorIsThatOfTorch) {
  EXPECT_DOUBLE_EQ(clip_factor(0.5, 1.0), 1.0);
  EXPECT_DOUBLE_EQ(clip_factor(4.0, 1.0), 1.0 / (4.0 + 1e-6));
  EXPECT_DOUBLE_EQ(clip_factor(1e9, 0.0), 1.0);
}

TEST(Norm, CountsEveryGradientOnce) {
  std::vector<Parameter> parameters{parameter("a", at::zeros({2, 2}), true),
                                    parameter("b", at::zeros({3}), false)};
  parameters[0].value.mutable_grad() = at::full({2, 2}, 2.0f);
  parameters[1].value.mutable_grad() = at::full({3}, 3.0f);
  EXPECT_NEAR(squared_gradient_norm(parameters, Group()).item<double>(), 16 + 27, 1e-4);
}

TEST(Order, PermutesEveryLength) {
  for (const int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 4097}) {
    for (const uint64_t key : {uint64_t{0}, uint64_t{1}, uint64_t{0xdeadbeefcafe}}) {
      std::set<int64_t> seen;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t p = permuted_index(i, n, key);
        ASSERT_GE(p, 0);
        ASSERT_LT(p, n);
        seen.insert(p);
      }
      ASSERT_EQ(static_cast<int64_t>(seen.size()), n);
    }
  }
}

TEST(Order, LooksShuffled) {
  // The mean distance of neighbours in a random order of n is n / 3.
  const int64_t n = 5000;
  double distance = 0;
  int64_t fixed = 0;
  for (int64_t i = 0; i + 1 < n; ++i) {
    distance += std::abs(
        static_cast<double>(permuted_index(i, n, 7) - permuted_index(i + 1, n, 7)));
    fixed += permuted_index(i, n, 7) == i ? 1 : 0;
  }
  EXPECT_NEAR(distance / static_cast<double>(n), static_cast<double>(n) / 3,
              static_cast<double>(n) * 0.03);
  EXPECT_LT(fixed, 10);
}

std::shared_ptr<const TokenFile> counting_file(const TemporaryDirectory& directory,
                                               int64_t tokens) {
  std::vector<std::vector<int64_t>> documents(2);
  for (int64_t i = 0; i < tokens; ++i) {
    documents[i < tokens / 3 ? 0 : 1].push_back(i);
  }
  write_token_file(directory / "count", documents);
  return std::make_shared<const TokenFile>(TokenFile::open(directory / "count"));
}

TEST(Sequences, EveryLabelOnceAnEpochAndShiftedByOne) {
  const TemporaryDirectory directory;
  const auto file = counting_file(directory, 100);
  const SequenceDataset data(file, 10, 91, 8, 42);  // 81 tokens: 10 windows
  ASSERT_EQ(data.windows(), 10);
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    const Batch batch = data.samples(epoch * 10, 10);
    ASSERT_EQ(batch.tokens.sizes(), (std::vector<int64_t>{10, 8}));
    EXPECT_TRUE(at::equal(batch.tokens + 1, batch.labels));
    const at::Tensor sorted = std::get<0>(batch.labels.flatten().sort());
    EXPECT_TRUE(at::equal(sorted, at::arange(11, 91)));
  }
  EXPECT_FALSE(at::equal(data.samples(0, 10).tokens, data.samples(10, 10).tokens))
      << "each epoch has its own order";
  EXPECT_FALSE(at::equal(data.samples(0, 10).tokens,
                         SequenceDataset(file, 10, 91, 8, 43).samples(0, 10).tokens));
  EXPECT_TRUE(at::equal(data.ordered(3, 2).tokens[1], at::arange(10 + 32, 10 + 40)));
}

TEST(Sequences, ASampleDoesNotDependOnHowItIsRead) {
  const TemporaryDirectory directory;
  const SequenceDataset data(counting_file(directory, 1000), 0, 1000, 16, 5);
  const at::Tensor whole = data.samples(55, 20).tokens;  // crosses an epoch: 62 windows
  EXPECT_TRUE(at::equal(at::cat({data.samples(55, 3).tokens, data.samples(58, 17).tokens}), whole));
}

TEST(Sequences, RefusesARangeThatIsTooShort) {
  const TemporaryDirectory directory;
  const auto file = counting_file(directory, 50);
  expect_error(ErrorKind::kData, {"count.bin", "[40, 50)", "seq_len + 1 = 11"},
               [&] { SequenceDataset(file, 40, 50, 10, 1); });
  EXPECT_EQ(SequenceDataset(file, 39, 50, 10, 1).windows(), 1);
  expect_error(ErrorKind::kUsage, {"seq_len"}, [&] { SequenceDataset(file, 0, 50, 0, 1); });
}

// ---- TensorBoard --------------------------------------------------------------------------------

uint64_t read_varint(const std::string& bytes, size_t& at) {
  uint64_t value = 0;
  for (unsigned shift = 0;; shift += 7) {
    const auto byte = static_cast<unsigned char>(bytes.at(at++));
    value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) {
      return value;
    }
  }
}

template <typename T>
T read_raw(const std::string& bytes, size_t& at) {
  T value;
  std::memcpy(&value, bytes.substr(at, sizeof(T)).data(), sizeof(T));
  at += sizeof(T);
  return value;
}

/// Field number -> raw values (varints as 8 bytes).
std::multimap<uint64_t, std::string> parse_message(const std::string& bytes) {
  std::multimap<uint64_t, std::string> fields;
  for (size_t at = 0; at < bytes.size();) {
    const uint64_t key = read_varint(bytes, at);
    std::string raw;
    switch (key & 7U) {
      case 0: {
        const uint64_t value = read_varint(bytes, at);
        raw.assign(reinterpret_cast<const char*>(&value), sizeof(value));
        break;
      }
      case 1:
        raw = bytes.substr(at, 8);
        at += 8;
        break;
      case 2: {
        const uint64_t length = read_varint(bytes, at);
        raw = bytes.substr(at, length);
        at += length;
        break;
      }
      case 5:
        raw = bytes.substr(at, 4);
        at += 4;
        break;
      default: ADD_FAILURE() << "wire type " << (key & 7U); return fields;
    }
    fields.emplace(key >> 3U, raw);
  }
  return fields;
}

template <typename T>
T field(const std::multimap<uint64_t, std::string>& fields, uint64_t number) {
  const auto found = fields.find(number);
  T value{};
  if (found != fields.end()) {
    std::memcpy(&value, found->second.data(), sizeof(T));
  }
  return value;
}

std::vector<std::string> parse_records(const std::string& bytes) {
  std::vector<std::string> records;
  for (size_t at = 0; at < bytes.size();) {
    const size_t start = at;
    const auto length = read_raw<uint64_t>(bytes, at);
    EXPECT_EQ(read_raw<uint32_t>(bytes, at), masked_crc32c(bytes.data() + start, 8));
    records.push_back(bytes.substr(at, length));
    at += length;
    EXPECT_EQ(read_raw<uint32_t>(bytes, at), masked_crc32c(records.back().data(), length));
  }
  return records;
}

TEST(Crc, IsCastagnoli) {
  EXPECT_EQ(crc32c("123456789", 9), 0xe3069283U);  // the check value of CRC-32C
  const std::string zeros(32, '\0');
  EXPECT_EQ(crc32c(zeros.data(), zeros.size()), 0x8a9136aaU);  // RFC 3720, appendix B.4
}

TEST(Events, CanBeReadBack) {
  const TemporaryDirectory directory;
  EventWriter writer(directory.path(), 0);
  writer.scalars(300, {{"loss_metrics/global_avg_loss", 2.5}, {"lr", 1e-4}});
  EXPECT_TRUE(writer.path().filename().string().starts_with("events.out.tfevents."));
  const auto records = parse_records(read_bytes(writer.path()));
  ASSERT_EQ(records.size(), 2U);
  EXPECT_EQ(parse_message(records[0]).find(3)->second, "brain.Event:2");
  const auto event = parse_message(records[1]);
  EXPECT_EQ(field<int64_t>(event, 2), 300);
  EXPECT_GT(field<double>(event, 1), 1.6e9);
  const auto values = parse_message(event.find(5)->second);
  ASSERT_EQ(values.count(1), 2U);
  const auto first = parse_message(values.find(1)->second);
  EXPECT_EQ(first.find(1)->second, "loss_metrics/global_avg_loss");
  EXPECT_EQ(field<float>(first, 2), 2.5f);
}

TEST(Events, AResumedRunTellsTensorBoardToForgetLaterSteps) {
  const TemporaryDirectory directory;
  const EventWriter writer(directory.path(), 7);
  const auto records = parse_records(read_bytes(writer.path()));
  ASSERT_EQ(records.size(), 2U);
  const auto start = parse_message(records[1]);
  EXPECT_EQ(field<int64_t>(start, 2), 8);
  EXPECT_EQ(field<int64_t>(parse_message(start.find(7)->second), 1), 1);  // SessionLog.START
}

MetricRow row(int64_t step, double loss) {
  MetricRow made{step, {}};
  made.set("loss", loss);
  made.set("valid_loss", std::nan(""));
  return made;
}

TEST(Metrics, AreWrittenThreeWaysAndCutWhenARunIsResumed) {
  const TemporaryDirectory directory;
  {
    MetricsWriter writer(directory.path(), 0);
    for (int64_t step = 1; step <= 5; ++step) {
      writer.write(row(step, 1.0 / static_cast<double>(step)));
    }
    expect_error(ErrorKind::kInternal, {"bogus"}, [&] {
      MetricRow bad{6, {}};
      bad.set("bogus", 1);
      writer.write(bad);
    });
  }
  // The process died while it wrote a line.
  std::ofstream(directory / "metrics.jsonl", std::ios::app) << "{\"step\": 6, \"lo";
  {
    MetricsWriter writer(directory.path(), 3);
    writer.write(row(4, 9.0));
  }
  std::vector<nlohmann::json> lines;
  std::ifstream jsonl(directory / "metrics.jsonl");
  for (std::string line; std::getline(jsonl, line);) {
    lines.push_back(nlohmann::json::parse(line));
  }
  ASSERT_EQ(lines.size(), 4U);
  EXPECT_EQ(lines[2]["step"], 3);
  EXPECT_EQ(lines[2]["loss"].get<double>(), 1.0 / 3);
  EXPECT_EQ(lines[3]["loss"], 9.0);
  EXPECT_FALSE(lines[3].contains("valid_loss")) << "what was not measured is absent";

  std::ifstream csv(directory / "metrics.csv");
  std::vector<std::string> rows;
  for (std::string line; std::getline(csv, line);) {
    rows.push_back(line);
  }
  ASSERT_EQ(rows.size(), 5U);
  EXPECT_TRUE(rows[0].starts_with("step,loss,grad_norm,lr,"));
  EXPECT_TRUE(rows[4].starts_with("4,9.0,,"));
  const auto columns = std::count(rows[0].begin(), rows[0].end(), ',');
  for (const std::string& line : rows) {
    EXPECT_EQ(std::count(line.begin(), line.end(), ','), columns);
  }
}

TEST(Metrics, ADeathWhileARunIsResumedLosesNothing) {
  const TemporaryDirectory directory;
  {
    MetricsWriter writer(directory.path(), 0);
    for (int64_t step = 1; step <= 9; ++step) {
      writer.write(row(step, 1.0));
    }
  }
  const std::string jsonl = read_bytes(directory / "metrics.jsonl"),
                    csv = read_bytes(directory / "metrics.csv");
  const test::FileSizeLimit limit(1);  // every write fails
  expect_error(ErrorKind::kStorage, {"cannot write"}, [&] { MetricsWriter(directory.path(), 7); });
  EXPECT_EQ(read_bytes(directory / "metrics.jsonl"), jsonl);
  EXPECT_EQ(read_bytes(directory / "metrics.csv"), csv);
}

TEST(Metrics, AFullDiskIsAStorageError) {
  const TemporaryDirectory directory;
  MetricsWriter writer(directory.path(), 0);
  const test::FileSizeLimit limit(512);
  expect_error(ErrorKind::kStorage, {"cannot write", directory.path().string()}, [&] {
    for (int64_t step = 1; step < 100; ++step) {
      writer.write(row(step, 1.0));
    }
  });
}

}  // namespace
}  // namespace drrl
