#pragma once

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <vector>

#include <ATen/Parallel.h>

#include "distributed/topology/mesh.h"
#include "models/data/sequence_dataset.h"
#include "models/data/token_file.h"
#include "tests/support/mpi_test.h"

namespace drrl {

/// Ranks x ranks of the test's world, or one process for each rank by itself; kv_heads as in
/// MeshShape.
inline Mesh make_mesh(int64_t tp, int64_t dp, int64_t cp = 1, int64_t kv_heads = 0) {
  return tp * dp * cp == 1 ? Mesh()
                           : Mesh::create(Environment::detect(), {tp, dp, cp, kv_heads}, at::kCPU,
                                          std::chrono::seconds(60));
}

/// Fixture of training runs under mpirun: one folder for the world, made by rank 0, with a text in
/// it.
class TrainingTest : public MpiTest {
 protected:
  /// Windows of seq_len tokens of the document: to train on the first train_tokens, to validate by
  /// the rest.
  void prepare(const std::vector<int64_t>& document, int64_t train_tokens, int64_t seq_len) {
    at::set_num_threads(1);
    char path[64] = "/tmp/drrl-train-XXXXXX";
    if (rank_ == 0) {
      ASSERT_NE(mkdtemp(path), nullptr);
    }
    MPI_Bcast(path, sizeof(path), MPI_CHAR, 0, MPI_COMM_WORLD);
    folder_ = path;
    if (rank_ == 0) {
      write_token_file(folder_ / "text", {document});
    }
    MPI_Barrier(MPI_COMM_WORLD);
    const auto file = std::make_shared<const TokenFile>(TokenFile::open(folder_ / "text"));
    train_ = std::make_shared<SequenceDataset>(file, 0, train_tokens, seq_len, 11);
    valid_ = std::make_shared<SequenceDataset>(file, train_tokens,
                                               static_cast<int64_t>(document.size()), seq_len, 11);
  }

  void TearDown() override {
    MPI_Barrier(MPI_COMM_WORLD);
    if (rank_ == 0) {
      std::error_code ignored;
      std::filesystem::remove_all(folder_, ignored);
    }
  }

  std::filesystem::path folder_;
  std::shared_ptr<const SequenceDataset> train_, valid_;
};

}  // namespace drrl
