// The main function of tests that run under mpirun. Every rank runs the same tests. After each test
// the ranks exchange their failures: rank 0 prints those of the others, and a test that failed
// anywhere has failed everywhere.
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <mpi.h>

namespace {

int world_rank() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

int world_size() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

class MpiListener : public testing::EmptyTestEventListener {
 public:
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (result.failed()) {
      std::ostringstream text;
      text << (result.file_name() ? result.file_name() : "unknown file") << ":"
           << result.line_number() << ": Failure\n"
           << result.message() << "\n";
      failures_ += text.str();
    }
  }

  void OnTestEnd(const testing::TestInfo& info) override {
    const bool failed_here = info.result()->Failed();
    const std::string failures = std::exchange(failures_, {});
    const int length = static_cast<int>(failures.size());
    std::vector<int> lengths(static_cast<std::size_t>(world_size()));
    MPI_Allgather(&length, 1, MPI_INT, lengths.data(), 1, MPI_INT, MPI_COMM_WORLD);
    std::vector<int> offsets;
    int total = 0;
    for (const int one : lengths) {
      offsets.push_back(total);
      total += one;
    }
    std::string all(static_cast<std::size_t>(total), '\0');
    MPI_Gatherv(failures.data(), length, MPI_CHAR, all.data(), lengths.data(), offsets.data(),
                MPI_CHAR, 0, MPI_COMM_WORLD);
    if (world_rank() == 0) {
      for (std::size_t rank = 1; rank < lengths.size(); ++rank) {
        if (lengths[rank] > 0) {
          std::printf("[ rank %2zu  ] %s\n", rank,
                      all.substr(static_cast<std::size_t>(offsets[rank]),
                                 static_cast<std::size_t>(lengths[rank]))
                          .c_str());
        }
      }
      std::fflush(stdout);
    }
    if (total > 0 && !failed_here) {
      // This makes the test fail on this rank too; not to be reported once more.
      ADD_FAILURE() << "failed on another rank";
      failures_.clear();
    }
  }

 private:
  std::string failures_;
};

}  // namespace

int main(int argc, char** argv) {
  int provided = MPI_THREAD_SINGLE;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  if (provided != MPI_THREAD_MULTIPLE) {
    std::fprintf(stderr, "MPI gave thread level %d, not MPI_THREAD_MULTIPLE\n", provided);
    MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
  }
  testing::InitGoogleTest(&argc, argv);
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  if (world_rank() != 0) {
    delete listeners.Release(listeners.default_result_printer());
  }
  listeners.Append(new MpiListener);

  int result = RUN_ALL_TESTS();
  // A test registered for N ranks that runs on another number proves nothing.
  const char* expected = std::getenv("DRRL_TEST_RANKS");
  if (expected && std::atoi(expected) != world_size()) {
    std::fprintf(stderr, "expected %s ranks, but the world has %d\n", expected, world_size());
    result = EXIT_FAILURE;
  }
  if (testing::UnitTest::GetInstance()->test_to_run_count() == 0) {
    std::fprintf(stderr, "no test was run\n");
    result = EXIT_FAILURE;
  }
  MPI_Allreduce(MPI_IN_PLACE, &result, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  MPI_Finalize();
  return result;
}
