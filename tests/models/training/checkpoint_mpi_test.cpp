// Checkpoints written by real processes, and the exchange of texts that they rest on.
#include <mpi.h>

#include "distributed/mpi/mpi_group.h"
#include "models/training/checkpoint.h"
#include "tests/support/io_support.h"

namespace drrl {
namespace {

namespace fs = std::filesystem;

Group world() {
  return make_mpi_group("world", MPI_COMM_WORLD, std::chrono::seconds(60));
}

// One folder for all ranks, made and removed by rank 0.
class SharedDirectory {
 public:
  explicit SharedDirectory(const Group& group) : group_(group) {
    if (group.rank() == 0) {
      own_.emplace();
    }
    path_ = exchange_over(group)(own_ ? own_->path().string() : "").front();
  }
  SharedDirectory(const SharedDirectory&) = delete;
  SharedDirectory& operator=(const SharedDirectory&) = delete;
  ~SharedDirectory() { group_.barrier(); }
  const fs::path& path() const { return path_; }

 private:
  Group group_;
  std::optional<test::TemporaryDirectory> own_;
  fs::path path_;
};

TEST(CheckpointMpi, ExchangeOfTextsOfAnyLength) {
  const Group group = world();
  const TextExchange exchange = exchange_over(group);
  for (const int64_t unit : {0, 1, 1000, 300'000}) {
    const auto text_of = [&](int64_t rank) {
      return std::string(static_cast<size_t>(unit * rank), static_cast<char>('a' + rank));
    };
    const auto all = exchange(text_of(group.rank()));
    ASSERT_EQ(static_cast<int64_t>(all.size()), group.size());
    for (int64_t rank = 0; rank < group.size(); ++rank) {
      EXPECT_EQ(all[static_cast<size_t>(rank)], text_of(rank));
    }
  }
}

TEST(CheckpointMpi, AllRanksSaveAndLoad) {
  const Group group = world();
  const SharedDirectory folder(group);
  const auto file = [](int64_t rank) { return "rank-" + std::to_string(rank) + ".safetensors"; };
  for (int64_t step = 1; step <= 3; ++step) {
    CheckpointWriter writer(folder.path(), step, group.rank(), group.size(), exchange_over(group));
    writer.write_tensors(file(group.rank()), {{"v", at::full({3}, 10 * step + group.rank())}});
    writer.commit(2);
  }
  const CheckpointReader reader = CheckpointReader::open(folder.path(), {false, {}});
  EXPECT_EQ(reader.step(), 3);
  EXPECT_EQ(reader.world_size(), group.size());
  EXPECT_EQ(static_cast<int64_t>(reader.files().size()), group.size());
  const int64_t other = (group.rank() + 1) % group.size();
  EXPECT_TRUE(at::equal(reader.tensors(file(other)).tensor("v"), at::full({3}, 30 + other)));
  EXPECT_FALSE(fs::exists(folder.path() / "step-00000001"));
}

TEST(CheckpointMpi, FullDiskOnTheLastRankReachesAll) {
  const Group group = world();
  const SharedDirectory folder(group);
  const int64_t last = group.size() - 1;
  std::optional<test::FileSizeLimit> limit;
  CheckpointWriter writer(folder.path(), 1, group.rank(), group.size(), exchange_over(group));
  if (group.rank() == last) {
    limit.emplace(1000);
  }
  writer.write_text("rank-" + std::to_string(group.rank()), std::string(2000, 'x'));
  limit.reset();
  test::expect_error(ErrorKind::kStorage, {"rank " + std::to_string(last), "File too large"},
                     [&] { writer.commit(); });
  EXPECT_TRUE(test::listing(folder.path()).empty());
}

}  // namespace
}  // namespace drrl
