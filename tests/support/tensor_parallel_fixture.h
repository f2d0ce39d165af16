#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "distributed/mpi/mpi_group.h"
#include "distributed/topology/mesh.h"
#include "policy/rank_policy.h"
#include "tests/support/mpi_test.h"

namespace drrl::test {

/// Fixture of tests of a model that the whole world shares: `tp_` is all of it.
class TensorParallelTest : public MpiTest {
 protected:
  void SetUp() override {
    MpiTest::SetUp();
    tp_ = make_mpi_group("tp", MPI_COMM_WORLD, std::chrono::seconds(30));
    ASSERT_EQ(tp_.size(), size_);
  }
  void TearDown() override { MPI_Barrier(MPI_COMM_WORLD); }

  /// Mesh::kv of a model with so many KV heads. Collective.
  Group make_kv(int64_t kv_heads) const {
    return make_mpi_group("kv", MPI_COMM_WORLD, std::chrono::seconds(30),
                          kv_sharers_of(kv_heads, size_, rank_).begin);
  }

  Group tp_;
};

/// Policies for models of two layers, at most eight KV groups, head dim 16 and sequences of at most
/// `levels` tree levels: the last one gives every layer, group and level its own ranks.
inline std::vector<std::shared_ptr<RankPolicy>> rank_policies(int64_t levels) {
  constexpr int64_t kGroups = 8;
  RankTable table(2, kGroups, levels, {4, 8});
  const Ranks choices[] = {
      {4, 8},
      {16, 4},
      {6, 16},
      {8, 8},
      {16, 16}};  // none below d beyond the tokens of a block: it would be rounding
  for (int64_t i = 0; i < 2 * kGroups * levels; ++i) {
    table.at(i / (kGroups * levels), i / levels % kGroups, i % levels) = choices[i % 5];
  }
  return {make_exact_policy(), make_fixed_policy(6, 16),
          make_energy_policy(0.95, rank_buckets(at::kCPU, 16)), make_table_policy(table, "table")};
}

}  // namespace drrl::test
