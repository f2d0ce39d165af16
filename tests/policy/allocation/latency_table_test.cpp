#include "policy/allocation/latency_table.h"

#include <fstream>
#include <set>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/io/file_io.h"
#include "policy/allocation/allocation.h"
#include "policy/calibration/calibration.h"
#include "policy/rank_policy.h"
#include "tests/support/error_of.h"
#include "tests/support/temporary.h"

namespace drrl {
namespace {

constexpr int64_t kHeadDim = 64, kHeads = 3, kGroups = 2, kBlock = 256;
const Geometry kGeometry{kBlock, 4};
const std::vector<int64_t> kRanks = {16, 32, 48, 64};

// A device on which every part of a curve counts, gates included.
LatencyTable made_up() {
  LatencyTable t;
  t.key = {"abacus", "fp32", 2, kHeadDim, kHeads, kBlock, 2, "drrl 0, LibTorch 0"};
  t.groups = kGroups;
  t.sink_tokens = 4;
  t.seq_len = 8192;
  t.ranks = kRanks;
  t.exact = {0, 0.2, 1e-4, 2e-6};
  t.fixed = {0, 0.3, 1.5e-3, 0};
  t.scores = {{0.05, 0.02, 3e-4, 8e-7},
              {0.05, 0.03, 4e-4, 9e-7},
              {0.05, 0.05, 5e-4, 1.3e-6},
              {0, 0, 0, 2.2e-6}};
  t.values = {{0.03, 0.01, 2e-4, 5e-7},
              {0.03, 0.02, 3e-4, 7e-7},
              {0.03, 0.02, 4e-4, 1.1e-6},
              {0, 0, 0, 1.9e-6}};
  t.gated = LatencyCurve{0, 0, 5e-5, 1e-7};
  t.exact_entry = 2e-5;
  return t;
}

CostModel cost_model_of(const LatencyTable& t, const BlockTree& tree) {
  return t.cost_model(tree, kGroups, kHeads, kHeadDim);
}

RankTable uniform(const BlockTree& tree, Ranks all) {
  return RankTable(1, kGroups, tree.num_levels(), all);
}

// What the made-up device takes for each case that drrl-bench latency measures.
std::vector<LatencyPoint> measurements(const LatencyTable& t) {
  std::vector<LatencyPoint> points;
  for (const int64_t length : {512, 1024, 2048, 4096, 8192}) {
    const BlockTree tree(length, kGeometry);
    const CostModel costs = cost_model_of(t, tree);
    const auto add = [&](std::optional<Ranks> ranks, std::optional<int64_t> exact, double ns) {
      points.push_back({length, ranks, exact, ns / 1e6});
    };
    add(std::nullopt, std::nullopt, costs.exact);
    add(Ranks{64, 64}, std::nullopt, cost_of(costs, tree, uniform(tree, {64, 64}), 0));
    for (const int64_t rank : {16, 32, 48}) {
      for (const Ranks ranks : {Ranks{rank, rank}, Ranks{rank, 64}, Ranks{64, rank}}) {
        add(ranks, std::nullopt, cost_of(costs, tree, uniform(tree, ranks), 0));
      }
    }
    double gated = cost_of(costs, tree, uniform(tree, {16, 16}), 0), all_exact = 0;
    int64_t entries = 0;
    for (const PairRun& run : tree.runs()) {
      gated += costs.gated(run) * static_cast<double>(run.count * kGroups);
      all_exact += costs.exact_entries(run) * static_cast<double>(run.count * kGroups);
      entries += run.count * run.query_rows * run.key_rows * kHeads * kGroups;
    }
    add(Ranks{16, 16}, 0, gated);
    add(Ranks{16, 16}, entries, gated + all_exact);
  }
  return points;
}

Calibration calibration() {
  Calibration c;
  c.geometry = kGeometry;
  c.model = "model";
  c.data = "text";
  c.ranks = {16, 32, 48};
  at::manual_seed(3);
  c.damage = at::tensor({1.0, 0.3, 0.1}, at::kDouble) *
             at::rand({4, kGroups, 2, 3, 1}, at::kDouble).add(0.1);
  c.bases = at::randn({4, kGroups, 2, kHeadDim, kHeadDim});
  return c;
}

Allocation allocated(double budget, const BlockTree& tree, const LatencyTable* latency,
                     AllocationMethod how = AllocationMethod::kOptimal) {
  return allocate(calibration(), tree,
                  {.budget = budget,
                   .heads_per_group = kHeads,
                   .buckets = kRanks,
                   .method = how,
                   .seed = 1,
                   .latency = latency});
}

std::set<int64_t> ranks_in(const RankTable& table, FarKind kind) {
  std::set<int64_t> found;
  for (int64_t i = 0; i < table.layers() * table.groups() * table.levels(); ++i) {
    const Ranks& r = table.at(i / (table.groups() * table.levels()),
                              i / table.levels() % table.groups(), i % table.levels());
    found.insert(kind == FarKind::kScores ? r.qk : r.v);
  }
  return found;
}

double spent_by(const LatencyTable& t, const BlockTree& tree, const RankTable& ranks) {
  const CostModel costs = cost_model_of(t, tree);
  double sum = 0;
  for (int64_t layer = 0; layer < ranks.layers(); ++layer) {
    sum += cost_of(costs, tree, ranks, layer);
  }
  return sum / (static_cast<double>(ranks.layers()) * costs.exact);
}

TEST(Latency, AFitPredictsWhatWasNotMeasured) {
  const LatencyTable truth = made_up();
  LatencyTable blank = truth;
  blank.exact = blank.fixed = {};
  blank.scores = blank.values = {};
  blank.gated = std::nullopt;
  blank.exact_entry = 0;
  const LatencyTable fitted = LatencyTable::fit(blank, measurements(truth));
  for (const int64_t length : {700, 3000, 8192, 16384}) {
    const BlockTree tree(length, kGeometry);
    RankTable mixed(1, kGroups, tree.num_levels(), {64, 64});
    for (int64_t i = 0; i < kGroups * tree.num_levels(); ++i) {
      mixed.at(0, i / tree.num_levels(), i % tree.num_levels()) = {
          kRanks[static_cast<size_t>(i) % 4], kRanks[static_cast<size_t>(i + i / 3) % 4]};
    }
    const CostModel expected = cost_model_of(truth, tree), got = cost_model_of(fitted, tree);
    EXPECT_NEAR(got.exact / expected.exact, 1, 0.01);
    EXPECT_NEAR(cost_of(got, tree, mixed, 0) / cost_of(expected, tree, mixed, 0), 1, 0.01)
        << length;
    const PairRun& run = tree.runs().back();
    EXPECT_NEAR(got.gated(run) / expected.gated(run), 1, 0.05);
    EXPECT_NEAR(got.exact_entries(run) / expected.exact_entries(run), 1, 0.05);
  }
  // Noise makes no rank cheaper than a lower one.
  std::vector<LatencyPoint> noisy = measurements(truth);
  for (size_t i = 0; i < noisy.size(); ++i) {
    noisy[i].ms *= i % 3 == 0 ? 1.2 : 0.9;
  }
  const LatencyTable rough = LatencyTable::fit(blank, noisy);
  const BlockTree tree(8192, kGeometry);
  const CostModel costs = cost_model_of(rough, tree);
  for (const PairRun& run : tree.runs()) {
    for (const FarKind kind : {FarKind::kScores, FarKind::kValues}) {
      EXPECT_GE(costs.pair(run, kind, 16), 0);
      EXPECT_LE(costs.pair(run, kind, 16), costs.pair(run, kind, 32));
      EXPECT_LE(costs.pair(run, kind, 32), costs.pair(run, kind, 48));
    }
  }
}

TEST(Latency, PricesAddUp) {
  const LatencyTable t = made_up();
  const BlockTree tree(3000, kGeometry);
  const CostModel costs = cost_model_of(t, tree), one = t.cost_model(tree, 1, kHeads, kHeadDim);
  EXPECT_DOUBLE_EQ(costs.exact, kGroups * one.exact);
  EXPECT_DOUBLE_EQ(costs.fixed, kGroups * one.fixed);
  const auto changed = [&](std::initializer_list<std::pair<int64_t, int64_t>> places) {
    RankTable table = uniform(tree, {64, 64});
    for (const auto& [group, level] : places) {
      table.at(0, group, level) = {16, 32};
    }
    return cost_of(costs, tree, table, 0);
  };
  const double base = changed({});
  EXPECT_NEAR(changed({{0, 1}, {1, 2}}) - base, changed({{0, 1}}) - base + changed({{1, 2}}) - base,
              1e-6 * base);
  // A level's setup is shared out to its pairs.
  double pairs = 0, sum = 0, rows = 0;
  for (const PairRun& run : tree.runs()) {
    if (run.level == 0) {
      pairs += static_cast<double>(run.count);
      sum += static_cast<double>(run.count) * costs.pair(run, FarKind::kScores, 16);
      rows += static_cast<double>(run.count * run.query_rows);
    }
  }
  EXPECT_NEAR(sum / 1e6,
              0.05 + 0.02 * pairs + 3e-4 * (rows + pairs * kBlock) / 2 + 8e-7 * rows * kBlock,
              1e-9);
  EXPECT_NE(
      error_of(ErrorKind::kUsage, [&] { t.cost_model(tree, kGroups, 4, kHeadDim); }).find("4"),
      std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kUsage, [&] { costs.pair(tree.runs()[0], FarKind::kScores, 24); })
                .find("24"),
            std::string::npos);
}

TEST(Latency, ARankThatSavesNoTimeIsNotChosen) {
  LatencyTable t = made_up();
  t.scores[0] = t.scores[1];
  t.values[0] = t.values[1];
  const BlockTree tree(8192, kGeometry);
  for (const FarKind kind : {FarKind::kScores, FarKind::kValues}) {
    EXPECT_TRUE(ranks_in(allocated(0.5, tree, nullptr).table, kind).contains(16));
  }
  for (const double budget : {0.65, 0.75, 0.9}) {
    for (const AllocationMethod how : {AllocationMethod::kOptimal, AllocationMethod::kGreedy}) {
      const Allocation by_ms = allocated(budget, tree, &t, how);
      EXPECT_LE(by_ms.cost, budget + 1e-9);
      EXPECT_NEAR(by_ms.cost, spent_by(t, tree, by_ms.table), 1e-9);
      EXPECT_GT(by_ms.cost, budget - 0.02);
      for (const FarKind kind : {FarKind::kScores, FarKind::kValues}) {
        EXPECT_FALSE(ranks_in(by_ms.table, kind).contains(16)) << budget;
      }
    }
  }
  // Where low rank takes longer than exact, nothing is low.
  for (auto* curves : {&t.scores, &t.values}) {
    for (size_t i = 0; i + 1 < kRanks.size(); ++i) {
      (*curves)[i].setup = 1e3;
    }
  }
  t.exact.area *= 4;
  EXPECT_EQ(ranks_in(allocated(0.999, BlockTree(600, kGeometry), &t).table, FarKind::kScores),
            (std::set<int64_t>{64}));
}

TEST(Latency, BudgetsAreMetInMsOrRefused) {
  const LatencyTable t = made_up();
  const BlockTree tree(8192, kGeometry);
  for (const AllocationMethod how :
       {AllocationMethod::kOptimal, AllocationMethod::kGreedy, AllocationMethod::kRandom}) {
    const Allocation a = allocated(0.6, tree, &t, how);
    EXPECT_LE(spent_by(t, tree, a.table), 0.6 + 1e-9);
    EXPECT_NEAR(a.cost, spent_by(t, tree, a.table), 1e-9);
  }
  const std::string message = error_of(ErrorKind::kUsage,
                                       [&] { allocated(0.6, BlockTree(1024, kGeometry), &t); });
  EXPECT_NE(message.find("1024 tokens"), std::string::npos) << message;

  const auto shared = std::make_shared<const LatencyTable>(t);
  const auto policy = make_dp_policy(calibration(), 0.6, kRanks, 2, false, shared);
  EXPECT_NE(policy->describe().find("of the forward ms of abacus (2 threads, fp32"),
            std::string::npos)
      << policy->describe();
  EXPECT_NE(policy->describe(), make_dp_policy(calibration(), 0.6, kRanks, 2, false,
                                               std::make_shared<const LatencyTable>([&] {
                                                 LatencyTable other = t;
                                                 other.fixed.row *= 2;
                                                 return other;
                                               }()))
                                    ->describe());
  EXPECT_FALSE(policy->latency_fraction().has_value());
  policy->decide({0, 1, kHeads * kGroups, kGroups, 0, kHeadDim, tree, {}, {}});
  EXPECT_NEAR(policy->latency_fraction().value(), 0.6, 0.02);
  const auto by_operations = make_dp_policy(calibration(), 0.6, kRanks, 2);
  by_operations->decide({0, 1, kHeads * kGroups, kGroups, 0, kHeadDim, tree, {}, {}});
  EXPECT_FALSE(by_operations->latency_fraction().has_value());
  EXPECT_EQ(by_operations->describe().find(" ms"), std::string::npos);
}

TEST(Latency, GatesArePricedOrRefused) {
  LatencyTable t = made_up();
  Calibration c = calibration();
  c.gates = at::tensor({0.1}, at::kDouble);
  c.gated_damage = (0.05 * c.damage).unsqueeze(5);
  c.exact_entries = at::full({4, kGroups, 3, 4, 1}, 0.02, at::kDouble);
  const BlockTree tree(8192, kGeometry);
  const auto gates = [&] {
    const RankTable table = allocate(c, tree,
                                     {.budget = 0.6,
                                      .heads_per_group = kHeads,
                                      .buckets = kRanks,
                                      .with_gates = true,
                                      .latency = &t})
                                .table;
    int64_t gated = 0;
    for (int64_t i = 0; i < 4 * kGroups * tree.num_levels(); ++i) {
      gated += table.at(i / (kGroups * tree.num_levels()), i / tree.num_levels() % kGroups,
                        i % tree.num_levels())
                       .gated(kHeadDim)
                   ? 1
                   : 0;
    }
    return gated;
  };
  EXPECT_GT(gates(), 0);
  t.gated->area = 1e-5;
  EXPECT_EQ(gates(), 0);
  t.gated = std::nullopt;
  EXPECT_NE(error_of(ErrorKind::kUsage, gates).find("--gates"), std::string::npos);
}

TEST(Latency, SurvivesItsFile) {
  const LatencyTable t = made_up();
  const auto file = temporary("latency.json"), again = temporary("again.json");
  t.save(file, measurements(t));
  const LatencyTable back = LatencyTable::load(file);
  EXPECT_EQ(back.key, t.key);
  EXPECT_EQ(back.describe(), t.describe());
  back.save(again);
  t.save(file);
  EXPECT_EQ(read_text(again, ErrorKind::kModel), read_text(file, ErrorKind::kModel));
  LatencyTable bad = t;
  bad.scores.front().row = std::nan("");
  EXPECT_NE(
      error_of(ErrorKind::kModel, [&] { bad.save(again); }).find("again.json\": \"scores.row\" is"),
      std::string::npos);
  EXPECT_EQ(LatencyTable::load(again).describe(), t.describe()) << "the older file is still there";
  back.check_key(t.key);
  const auto refused = [&](const std::string& field, const std::string& found,
                           const std::string& expected, auto&& change) {
    LatencyKey key = t.key;
    change(key);
    const std::string message = error_of(ErrorKind::kUsage, [&] { back.check_key(key); });
    for (const std::string& part :
         {std::string("latency.json"), "\"" + field + "\"", found, expected}) {
      EXPECT_NE(message.find(part), std::string::npos) << part << " in " << message;
    }
  };
  refused("device", "abacus", "slide rule", [](LatencyKey& k) { k.device = "slide rule"; });
  refused("dtype", "fp32", "bf16", [](LatencyKey& k) { k.dtype = "bf16"; });
  refused("threads", "2", "7", [](LatencyKey& k) { k.threads = 7; });
  refused("head_dim", "64", "128", [](LatencyKey& k) { k.head_dim = 128; });
  refused("heads_per_group", "3", "5", [](LatencyKey& k) { k.heads_per_group = 5; });
  refused("near_block", "256", "512", [](LatencyKey& k) { k.near_block = 512; });
  refused("update_steps", "2", "-1", [](LatencyKey& k) { k.update_steps = -1; });
  refused("versions", "drrl 0", "drrl 1", [](LatencyKey& k) { k.versions = "drrl 1, LibTorch 0"; });
}

TEST(Latency, NamesWhatIsWrongWithAFile) {
  const auto file = temporary("bad.json");
  made_up().save(file);
  const auto good = nlohmann::json::parse(read_text(file, ErrorKind::kModel));
  const auto expect = [&](const std::vector<std::string>& parts) {
    const std::string message = error_of(ErrorKind::kModel, [&] { LatencyTable::load(file); });
    for (const std::string& part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << part << " in " << message;
    }
    EXPECT_NE(message.find("bad.json"), std::string::npos) << message;
  };
  const auto with = [&](auto&& change) {
    auto json = good;
    change(json);
    std::ofstream(file) << json;
  };
  std::ofstream(file) << "{";
  expect({"not a JSON object"});
  with([](auto& j) { j["format"] = "drrl-latency-1"; });
  expect({"format", "drrl-latency-1", "drrl-latency-2"});
  with([](auto& j) { j["key"].erase("threads"); });
  expect({"no \"threads\""});
  with([](auto& j) { j["key"]["head_dim"] = "64"; });
  expect({"head_dim", "64", "integer"});
  with([](auto& j) { j["backward"] = 1; });
  expect({"backward", "1", "true or false"});
  with([](auto& j) { j["ranks"] = {16, 48, 32, 64}; });
  expect({"ranks", "32", "49"});
  with([](auto& j) { j["ranks"] = {16, 32, 48, 60}; });
  expect({"ranks", "head_dim 64"});
  with([](auto& j) { j["scores"].erase(0); });
  expect({"scores", "list of 4"});
  with([](auto& j) { j["values"][1]["area"] = -1.0; });
  expect({"values.area", "-1.0", "not negative"});
  with([](auto& j) { j["exact"] = {{"setup", 0}, {"pair", 0}, {"row", 0}, {"area", 0}}; });
  expect({"exact", "some time"});
  with([](auto& j) { j["exact_entry"] = -1; });
  expect({"exact_entry", "-1", "not negative"});
  error_of(ErrorKind::kModel, [] { LatencyTable::load(temporary("nowhere.json")); });
}

}  // namespace
}  // namespace drrl
