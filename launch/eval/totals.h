#pragma once

#include <cstdint>
#include <vector>

#include <nlohmann/json.hpp>

#include "distributed/topology/mesh.h"
#include "policy/attention/attention_statistics.h"

namespace drrl {

/// Sums over the sequences that a process evaluated under one policy.
struct Totals {
  double nll = 0;
  int64_t tokens = 0;
  AttentionStatistics attention;
  std::vector<double> sequence_nll =
      {};  ///< mean of each sequence, 0 of those that other data-parallel ranks evaluate
};

/// What data-parallel ranks filled in, each its own places of the same list, zeros elsewhere.
std::vector<double> merge(const std::vector<double>& mine, const Mesh& mesh);

/// The whole world's totals: losses over data-parallel ranks, operations and decisions over all,
/// times of the slowest rank of those that share a sequence. Errors: Error(kNumerics) for a loss
/// that is not finite.
Totals reduce(const Totals& mine, const Mesh& mesh);

/// What attention cost, for results.
nlohmann::ordered_json attention_json(const AttentionStatistics& statistics, int64_t head_dim);

/// Says how many pairs no low rank served, by the results that hold attention_json.
void print_exact_pairs(const nlohmann::ordered_json& json);

}  // namespace drrl
