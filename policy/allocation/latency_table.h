#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "core/types/block_tree.h"
#include "core/types/ranks.h"
#include "policy/allocation/cost_model.h"

namespace drrl {

/// What measured times depend on. Times of one key say nothing about another.
struct LatencyKey {
  std::string device;  ///< name of the processor or GPU
  std::string dtype;
  int64_t threads = 0;  ///< of the CPU; 0 on a GPU
  int64_t head_dim = 0;
  int64_t heads_per_group = 0;
  int64_t near_block = 0;
  int64_t update_steps = 0;
  std::string versions;  ///< of drrl and LibTorch

  bool operator==(const LatencyKey&) const = default;
};

/// ms of something that has `queries` rows and `keys` rows.
struct LatencyCurve {
  double setup = 0;  ///< once for all pairs of a level
  double pair = 0;   ///< and for each: at any size,
  double row = 0;    ///< for each row, the mean of queries and keys,
  double area = 0;   ///< for each query and key

  double of_pair(int64_t queries, int64_t keys) const {
    return pair + row * static_cast<double>(queries + keys) / 2 +
           area * static_cast<double>(queries) * static_cast<double>(keys);
  }
};

/// One measured call of one layer's attention over one sequence.
struct LatencyPoint {
  int64_t seq_len = 0;
  std::optional<Ranks> ranks;  ///< of every far pair; none: exact attention. {d, d}: exact pairs,
                               ///< but within low-rank attention
  std::optional<int64_t>
      exact_entries;  ///< those that gates made exact, of all heads, if the ranks have a gate
  double ms = 0;
};

/// How long attention takes on one device, by ranks: measured by `drrl-bench latency`, kept as a
/// JSON file. All curves are of one KV group of one sequence, setups shared out to the KV groups
/// that were measured together; scores and values add up.
class LatencyTable {
 public:
  LatencyKey key;
  bool backward = false;  ///< whether the times are of forward and backward passes together
  int64_t groups = 0;     ///< KV groups measured
  int64_t sink_tokens = 0;
  int64_t seq_len = 0;                       ///< the longest sequence measured
  std::vector<int64_t> ranks;                ///< ascending, head_dim the last
  LatencyCurve exact;                        ///< exact attention of L tokens: of_pair(L, L)
  LatencyCurve fixed;                        ///< what no rank changes, likewise
  std::vector<LatencyCurve> scores, values;  ///< of a far pair, by rank
  std::optional<LatencyCurve>
      gated;  ///< what a gate adds to a far pair; none: gates were not measured, none can be chosen
  double exact_entry = 0;  ///< what an entry (of one head) that a gate makes exact adds [ms]

  /// Fits the curves to measurements of `key.head_dim` and `groups` KV groups by least squares of
  /// relative errors. No part of a curve is negative, and a higher rank below head_dim is nowhere
  /// cheaper; nor is an exact product than one at a lower rank, though it may save basis and
  /// projections. `table` has key, backward, groups, sink_tokens and ranks. Errors: Error(kUsage)
  /// if a point's ranks are not the table's.
  static LatencyTable fit(LatencyTable table, const std::vector<LatencyPoint>& points);

  /// In ns, for a layer of `layer_groups` KV groups. Errors: Error(kUsage) if tree or shape are not
  /// those of the key.
  CostModel cost_model(const BlockTree& tree, int64_t layer_groups, int64_t heads_per_group,
                       int64_t head_dim) const;

  /// Errors: Error(kUsage) naming the file, the first field that differs, its value and the
  /// expected one.
  void check_key(const LatencyKey& expected) const;

  /// "forward ms of AMD EPYC (2 threads, fp32; 0123456789abcdef)", the last a digest of all
  /// latencies.
  std::string describe() const;

  /// Writes atomically, with what it was fitted to. Errors: Error(kStorage).
  void save(const std::filesystem::path& file, const std::vector<LatencyPoint>& points = {}) const;

  /// Errors: Error(kModel) that names the file, the field, what it holds and what was expected.
  static LatencyTable load(const std::filesystem::path& file);

 private:
  std::string text(const std::vector<LatencyPoint>& points) const;

  std::string file_ = "the latency table";  // for messages
};

/// What an allocation spends: the table's time, or operations where there is none. Errors: as
/// LatencyTable::cost_model.
CostModel cost_model_of(const LatencyTable* latency, const BlockTree& tree, int64_t groups,
                        int64_t heads_per_group, int64_t head_dim, int64_t update_steps);

/// The cost of one layer of a table of ranks, its gates left out: what attention should take.
class RankTable;
double cost_of(const CostModel& costs, const BlockTree& tree, const RankTable& table,
               int64_t layer);

}  // namespace drrl
