#include "models/training/checkpoint.h"

#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>

#include <barrier>
#include <thread>

#include <nlohmann/json.hpp>

#include "tests/support/io_support.h"

namespace drrl {
namespace {

namespace fs = std::filesystem;
using test::expect_error;
using test::listing;
using test::TemporaryDirectory;
using test::write_bytes;

// Ranks as threads: an all-gather through shared memory.
class ThreadWorld {
 public:
  explicit ThreadWorld(int64_t size) : texts_(static_cast<size_t>(size)), barrier_(size) {}

  TextExchange exchange(int64_t rank) {
    return [this, rank](const std::string& mine) {
      texts_[static_cast<size_t>(rank)] = mine;
      barrier_.arrive_and_wait();
      std::vector<std::string> all = texts_;
      barrier_.arrive_and_wait();
      return all;
    };
  }

  // Runs action(rank) on every rank; the messages of those that threw drrl::Error, by rank.
  std::map<int64_t, std::string> run(const std::function<void(int64_t)>& action) {
    std::vector<std::string> failures(texts_.size());
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < texts_.size(); ++rank) {
      threads.emplace_back([&, rank] {
        try {
          action(static_cast<int64_t>(rank));
        } catch (const Error& error) {
          failures[rank] = std::string(name(error.kind())) + ": " + error.what();
        }
      });
    }
    for (auto& thread : threads) {
      thread.join();
    }
    std::map<int64_t, std::string> result;
    for (size_t rank = 0; rank < failures.size(); ++rank) {
      if (!failures[rank].empty()) {
        result[static_cast<int64_t>(rank)] = failures[rank];
      }
    }
    return result;
  }

 private:
  std::vector<std::string> texts_;
  std::barrier<> barrier_;
};

fs::path save(const fs::path& root, int64_t step, int64_t keep_last = 0) {
  CheckpointWriter writer(root, step);
  writer.write_tensors("model.safetensors", {{"w", at::full({100}, static_cast<double>(step))}});
  writer.write_text("state.json", "{\"step\": " + std::to_string(step) + "}");
  return writer.commit(keep_last);
}

TEST(Checkpoint, RoundTrip) {
  const TemporaryDirectory folder;
  const fs::path root = folder / "deep/er";
  EXPECT_FALSE(CheckpointReader::latest(root).has_value());
  const fs::path written = save(root, 120);
  EXPECT_EQ(written, root / "step-00000120");
  EXPECT_EQ(listing(root), (std::vector<std::string>{"latest", "step-00000120"}));
  EXPECT_EQ(listing(written),
            (std::vector<std::string>{"manifest.json", "model.safetensors", "state.json"}));
  EXPECT_EQ(CheckpointReader::latest(root), written);
  for (const fs::path& path : {root, written, written / "."}) {
    for (const bool verify_all : {true, false}) {
      const CheckpointReader reader = CheckpointReader::open(path, {verify_all, {}});
      EXPECT_EQ(reader.step(), 120);
      EXPECT_EQ(reader.world_size(), 1);
      EXPECT_EQ(reader.files(), (std::vector<std::string>{"model.safetensors", "state.json"}));
      EXPECT_TRUE(
          at::equal(reader.tensors("model.safetensors").tensor("w"), at::full({100}, 120.0)));
      EXPECT_EQ(reader.text("state.json"), "{\"step\": 120}");
      EXPECT_FALSE(reader.contains("manifest.json"));
      expect_error(ErrorKind::kCheckpoint, {"no file \"other\""}, [&] { reader.text("other"); });
    }
  }
}

TEST(Checkpoint, StepsBeyondEightDigits) {
  const TemporaryDirectory folder;
  save(folder.path(), 99'999'999);
  save(folder.path(), 100'000'000);
  EXPECT_EQ(CheckpointReader::open(folder.path()).step(), 100'000'000);
}

TEST(Checkpoint, EveryRankWritesItsOwnFiles) {
  const TemporaryDirectory folder;
  ThreadWorld world(3);
  const auto failures = world.run([&](int64_t rank) {
    CheckpointWriter writer(folder.path(), 7, rank, 3, world.exchange(rank));
    writer.write_tensors("rank-" + std::to_string(rank) + ".safetensors",
                         {{"r", at::full({4}, rank)}});
    if (rank == 2) {
      writer.write_text("empty", "");
    }
    EXPECT_EQ(writer.commit(), folder / "step-00000007");
  });
  EXPECT_TRUE(failures.empty()) << failures.begin()->second;
  const CheckpointReader reader = CheckpointReader::open(folder.path());
  EXPECT_EQ(reader.world_size(), 3);
  EXPECT_EQ(reader.files().size(), 4U);
  EXPECT_TRUE(
      at::equal(reader.tensors("rank-2.safetensors").tensor("r"), at::full({4}, int64_t{2})));
  EXPECT_EQ(reader.text("empty"), "");
  const auto manifest = nlohmann::json::parse(
      test::read_bytes(folder / "step-00000007/manifest.json"));
  EXPECT_EQ(manifest.at("files").at("rank-1.safetensors").at("rank"), 1);
}

TEST(Checkpoint, FullDiskOnOneRankStopsAllAndHarmsNothing) {
  const TemporaryDirectory folder;
  save(folder.path(), 1);
  ThreadWorld world(3);
  const test::FileSizeLimit limit(2000);
  const auto failures = world.run([&](int64_t rank) {
    CheckpointWriter writer(folder.path(), 2, rank, 3, world.exchange(rank));
    writer.write_tensors("rank-" + std::to_string(rank),
                         {{"r", at::zeros({rank == 1 ? 1000 : 10})}});
    writer.write_text("more-" + std::to_string(rank), "x");  // not attempted after the failure
    writer.commit();
  });
  ASSERT_EQ(failures.size(), 3U);
  for (const auto& [rank, message] : failures) {
    EXPECT_EQ(message.find("storage: "), 0U) << message;
    for (const char* fragment :
         {"step-00000002", "was not written", "rank 1", "rank-1", "File too large"}) {
      EXPECT_NE(message.find(fragment), std::string::npos) << message << " lacks " << fragment;
    }
  }
  EXPECT_EQ(listing(folder.path()), (std::vector<std::string>{"latest", "step-00000001"}));
  EXPECT_EQ(CheckpointReader::open(folder.path()).step(), 1);
}

TEST(Checkpoint, FullDiskAtTheManifestStopsAll) {
  const TemporaryDirectory folder;
  save(folder.path(), 1);
  ThreadWorld world(2);
  const test::FileSizeLimit limit(200);
  const auto failures = world.run([&](int64_t rank) {
    CheckpointWriter writer(folder.path(), 2, rank, 2, world.exchange(rank));
    writer.write_text("rank-" + std::to_string(rank), "small");
    writer.commit();
  });
  ASSERT_EQ(failures.size(), 2U);
  EXPECT_NE(failures.at(1).find("manifest.json"), std::string::npos) << failures.at(1);
  EXPECT_EQ(listing(folder.path()), (std::vector<std::string>{"latest", "step-00000001"}));
}

// A file system of 256 KiB that only this test's thread sees. Needs root; the tests above reach the
// same code without.
TEST(Checkpoint, FileSystemThatIsReallyFull) {
  const TemporaryDirectory folder;
  bool mounted = false;
  std::thread([&] {
    mounted = unshare(CLONE_NEWNS) == 0 &&
              mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
              mount("tmpfs", folder.path().c_str(), "tmpfs", 0, "size=256k") == 0;
    if (!mounted) {
      return;
    }
    save(folder.path(), 1);
    expect_error(ErrorKind::kStorage, {"step-00000002", "rank 0", "big", "No space left on device"},
                 [&] {
                   CheckpointWriter writer(folder.path(), 2);
                   writer.write_tensors("big", {{"v", at::zeros({100'000})}});
                   writer.commit();
                 });
    EXPECT_EQ(listing(folder.path()), (std::vector<std::string>{"latest", "step-00000001"}));
    EXPECT_EQ(CheckpointReader::open(folder.path()).step(), 1);
    EXPECT_EQ(save(folder.path(), 3).filename(), "step-00000003") << "the room is free again";
  }).join();
  if (!mounted) {
    GTEST_SKIP() << "this user cannot mount a file system";
  }
}

TEST(Checkpoint, RootThatCannotBeMadeStopsAll) {
  const TemporaryDirectory folder;
  write_bytes(folder / "file", "x");
  ThreadWorld world(2);
  const auto failures = world.run([&](int64_t rank) {
    CheckpointWriter(folder / "file/root", 1, rank, 2, world.exchange(rank));
  });
  ASSERT_EQ(failures.size(), 2U);
  EXPECT_NE(failures.at(1).find("cannot create folder"), std::string::npos) << failures.at(1);
}

TEST(Checkpoint, TwoRanksWithOneFileNameAreStopped) {
  const TemporaryDirectory folder;
  ThreadWorld world(2);
  const auto failures = world.run([&](int64_t rank) {
    CheckpointWriter writer(folder.path(), 2, rank, 2, world.exchange(rank));
    writer.write_text("rank-" + std::to_string(rank), "x");
    if (rank == 0) {
      writer.write_text("same", "xx");
    }
    world.exchange(rank)("");
    if (rank == 1) {
      writer.write_text("same", "xx");
    }
    writer.commit();
  });
  ASSERT_EQ(failures.size(), 2U);
  EXPECT_NE(failures.at(0).find("another rank both wrote \"same\""), std::string::npos)
      << failures.at(0);
  EXPECT_TRUE(listing(folder.path()).empty());
}

TEST(Checkpoint, WithoutCommitNothingIsLeft) {
  const TemporaryDirectory folder;
  {
    CheckpointWriter writer(folder.path(), 5);
    writer.write_text("a", "b");
  }
  EXPECT_TRUE(listing(folder.path()).empty());
  expect_error(ErrorKind::kCheckpoint, {folder.path().string(), "there is no checkpoint"},
               [&] { CheckpointReader::open(folder.path()); });
}

// The process dies at each point where the ranks meet: before the folder, before the manifest, and
// after the rename.
TEST(Checkpoint, DeathOfTheProcessLeavesTheOldOrTheNewOne) {
  for (int dies_at = 0; dies_at < 3; ++dies_at) {
    SCOPED_TRACE(dies_at);
    const TemporaryDirectory folder;
    save(folder.path(), 1);
    const pid_t child = fork();
    if (child == 0) {
      int meetings = 0;
      CheckpointWriter writer(folder.path(), 2, 0, 1, [&](const std::string& mine) {
        if (meetings++ == dies_at) {
          _exit(9);
        }
        return std::vector<std::string>{mine};
      });
      writer.write_text("a", "b");
      writer.commit();
      _exit(0);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_EQ(WEXITSTATUS(status), 9);
    EXPECT_EQ(CheckpointReader::open(folder.path()).step(), dies_at == 2 ? 2 : 1);
    if (dies_at < 2) {
      const fs::path half = folder / ".tmp-step-00000002";
      ASSERT_TRUE(fs::exists(half));
      expect_error(ErrorKind::kCheckpoint, {".tmp-step-00000002", "unfinished"},
                   [&] { CheckpointReader::open(half); });
    }
    save(folder.path(), 3);
    EXPECT_FALSE(fs::exists(folder / ".tmp-step-00000002"))
        << "leftovers are removed by the next save";
  }
}

TEST(Checkpoint, KeepsTheLastOnes) {
  const TemporaryDirectory folder;
  write_bytes(folder / "notes.txt", "not ours");
  fs::create_directory(folder / "step-1");  // not our spelling either
  for (int64_t step = 1; step <= 5; ++step) {
    save(folder.path(), step, 2);
  }
  EXPECT_EQ(listing(folder.path()),
            (std::vector<std::string>{"latest", "notes.txt", "step-00000004", "step-00000005",
                                      "step-1"}));
  // After going back, the new one stays although later steps of the abandoned run are there.
  save(folder.path(), 2, 2);
  EXPECT_EQ(listing(folder.path()),
            (std::vector<std::string>{"latest", "notes.txt", "step-00000002", "step-00000005",
                                      "step-1"}));
  EXPECT_EQ(CheckpointReader::open(folder.path()).step(), 2);
}

TEST(Checkpoint, TheSameStepIsReplaced) {
  const TemporaryDirectory folder;
  save(folder.path(), 4);
  CheckpointWriter writer(folder.path(), 4);
  writer.write_text("other", "content");
  writer.commit();
  EXPECT_EQ(listing(folder.path()), (std::vector<std::string>{"latest", "step-00000004"}));
  EXPECT_EQ(CheckpointReader::open(folder.path()).files(), std::vector<std::string>{"other"});
}

TEST(Checkpoint, NamesThatEscapeAreRefused) {
  const TemporaryDirectory folder;
  CheckpointWriter writer(folder.path(), 1);
  for (const char* file : {"", "a/b", "../a", ".hidden", "manifest.json", "a b", "a\nb"}) {
    expect_error(ErrorKind::kInternal, {"cannot be the name"},
                 [&] { writer.write_text(file, "x"); });
  }
  writer.write_text("a", "x");
  expect_error(ErrorKind::kInternal, {"\"a\" is written twice"},
               [&] { writer.write_text("a", "x"); });
  expect_error(ErrorKind::kInternal, {"rank 2 of 2"},
               [&] { CheckpointWriter(folder.path(), 1, 2, 2, {}); });
  expect_error(ErrorKind::kInternal, {"needs an exchange"},
               [&] { CheckpointWriter(folder.path(), 1, 0, 2, {}); });
}

struct Damage {
  std::string what;
  std::function<void(const fs::path& checkpoint)> harm;
  std::vector<std::string> fragments;
};

void flip_bit(const fs::path& path, size_t position) {
  std::string bytes = test::read_bytes(path);
  bytes.at(position) = static_cast<char>(bytes.at(position) ^ 4);
  write_bytes(path, bytes);
}

std::vector<Damage> damages() {
  const auto edit = [](const std::function<void(nlohmann::json&)>& change) {
    return [change](const fs::path& folder) {
      auto manifest = nlohmann::json::parse(test::read_bytes(folder / "manifest.json"));
      change(manifest);
      write_bytes(folder / "manifest.json", manifest.dump());
    };
  };
  return {
      {"bit flip in weights",
       [](const fs::path& f) { flip_bit(f / "model.safetensors", 300); },
       {"model.safetensors", "is damaged", "checksum", "manifest.json says"}},
      {"bit flip in state",
       [](const fs::path& f) { flip_bit(f / "state.json", 3); },
       {"state.json", "is damaged"}},
      {"truncated",
       [](const fs::path& f) { fs::resize_file(f / "model.safetensors", 100); },
       {"model.safetensors", "has 100 bytes", "manifest.json says"}},
      {"grown",
       [](const fs::path& f) { fs::resize_file(f / "state.json", 1000); },
       {"state.json", "has 1000 bytes"}},
      {"missing file",
       [](const fs::path& f) { fs::remove(f / "state.json"); },
       {"state.json", "is missing"}},
      {"missing manifest",
       [](const fs::path& f) { fs::remove(f / "manifest.json"); },
       {"no manifest.json", "not a complete checkpoint"}},
      {"missing folder",
       [](const fs::path& f) { fs::remove_all(f); },
       {"step-00000002", "does not exist"}},
      {"empty manifest",
       [](const fs::path& f) { write_bytes(f / "manifest.json", ""); },
       {"manifest.json", "is damaged"}},
      {"cut manifest",
       [](const fs::path& f) { fs::resize_file(f / "manifest.json", 100); },
       {"manifest.json", "is damaged"}},
      {"another JSON file",
       [](const fs::path& f) { write_bytes(f / "manifest.json", "{}"); },
       {"not the manifest of a drrl checkpoint"}},
      {"manifest is a list",
       [](const fs::path& f) { write_bytes(f / "manifest.json", "[]"); },
       {"not the manifest"}},
      {"version",
       edit([](auto& m) { m["version"] = 3; }),
       {"version 3", "versions 1 to 2 are supported"}},
      {"changed checksum",
       edit([](auto& m) { m["files"]["state.json"]["xxh3"] = "0123456789abcdef"; }),
       {"manifest.json", "is damaged", "its checksum is"}},
      {"dropped file",
       edit([](auto& m) { m["files"].erase("state.json"); }),
       {"manifest.json", "is damaged"}},
      {"no own checksum",
       edit([](auto& m) { m.erase("manifest_xxh3"); }),
       {"manifest.json", "is damaged", "manifest_xxh3"}},
      {"types", edit([](auto& m) { m["format"] = 3; }), {"manifest.json", "is damaged"}},
  };
}

TEST(Checkpoint, DamageIsFoundAndNamed) {
  for (const Damage& damage : damages()) {
    SCOPED_TRACE(damage.what);
    const TemporaryDirectory folder;
    save(folder.path(), 1);
    const fs::path newest = save(folder.path(), 2);
    damage.harm(newest);
    expect_error(ErrorKind::kCheckpoint, damage.fragments,
                 [&] { CheckpointReader::open(folder.path()); });

    std::vector<std::string> said;
    CheckpointReader::Options options;
    options.on_fallback = [&](const std::string& text) { said.push_back(text); };
    EXPECT_EQ(CheckpointReader::open(folder.path(), options).step(), 1);
    ASSERT_EQ(said.size(), 2U);
    for (const std::string& fragment : damage.fragments) {
      EXPECT_NE(said[0].find(fragment), std::string::npos) << said[0];
    }
    EXPECT_NE(said[1].find("step-00000001"), std::string::npos) << said[1];
    EXPECT_NE(said[1].find("instead"), std::string::npos) << said[1];
  }
}

TEST(Checkpoint, PathsThatCannotBeLookedAt) {
  const std::string path(5000, 'x');
  expect_error(ErrorKind::kCheckpoint, {"cannot look at", "too long"},
               [&] { CheckpointReader::open(path); });
  expect_error(ErrorKind::kCheckpoint, {"cannot look at", "too long"},
               [&] { CheckpointReader::latest(path); });
  expect_error(ErrorKind::kStorage, {"cannot begin checkpoint", "too long"},
               [&] { CheckpointWriter(path, 1); });
}

TEST(Checkpoint, RenamedFolderIsFound) {
  const TemporaryDirectory folder;
  fs::rename(save(folder.path(), 2), folder / "step-00000009");
  expect_error(ErrorKind::kCheckpoint, {"is of step 2", "unlike its folder"},
               [&] { CheckpointReader::open(folder / "step-00000009"); });
}

TEST(Checkpoint, WithoutLatestTheNewestIsFound) {
  const TemporaryDirectory folder;
  EXPECT_FALSE(CheckpointReader::any(folder.path()));
  save(folder.path(), 1);
  save(folder.path(), 2);
  fs::remove(folder / "latest");
  EXPECT_TRUE(CheckpointReader::any(folder.path()));
  expect_error(ErrorKind::kCheckpoint, {"neither a file \"latest\""},
               [&] { CheckpointReader::open(folder.path()); });
  std::string said;
  CheckpointReader::Options options;
  options.on_fallback = [&](const std::string& text) { said += text; };
  EXPECT_EQ(CheckpointReader::open(folder.path(), options).step(), 2);
  EXPECT_NE(said.find("neither a file \"latest\""), std::string::npos) << said;
}

// A process can die between the two renames of a save.
TEST(Checkpoint, OneThatLatestDoesNotNameYetIsTheNewest) {
  const TemporaryDirectory folder;
  save(folder.path(), 1);
  save(folder.path(), 2);
  write_bytes(folder / "latest", "step-00000001\n");
  EXPECT_EQ(CheckpointReader::open(folder.path()).step(), 2);
  std::vector<std::string> said;
  CheckpointReader::Options options;
  options.on_fallback = [&](const std::string& text) { said.push_back(text); };
  EXPECT_EQ(CheckpointReader::open(folder.path(), options).step(), 2);
  ASSERT_EQ(said.size(), 1U);
  EXPECT_NE(said[0].find("step-00000002"), std::string::npos) << said[0];
  EXPECT_NE(said[0].find("step-00000001"), std::string::npos) << said[0];
  flip_bit(folder / "step-00000002/state.json", 2);
  EXPECT_EQ(CheckpointReader::open(folder.path(), options).step(), 1);
}

TEST(Checkpoint, StepsOfAnAbandonedRunAreNotTheNewest) {
  const TemporaryDirectory folder;
  for (const int64_t step : {1, 5, 2}) {
    save(folder.path(), step);
  }
  CheckpointReader::Options options;
  options.on_fallback = [](const std::string&) {};
  EXPECT_EQ(CheckpointReader::open(folder.path(), options).step(), 2);
  fs::remove(folder / "latest");
  EXPECT_EQ(CheckpointReader::open(folder.path(), options).step(), 2) << "without 'latest', too";
  flip_bit(folder / "step-00000002/state.json", 2);
  EXPECT_EQ(CheckpointReader::open(folder.path(), options).step(), 5) << "but the next best";
  // One whose manifest is damaged is no checkpoint to keep.
  flip_bit(folder / "step-00000005/manifest.json", 30);
  save(folder.path(), 3, 2);
  EXPECT_EQ(listing(folder.path()),
            (std::vector<std::string>{"latest", "step-00000002", "step-00000003"}));
}

TEST(Checkpoint, ALatestThatIsALoopOfLinksIsPassedOver) {
  const TemporaryDirectory folder;
  save(folder.path(), 1);
  fs::remove(folder / "latest");
  fs::create_symlink("latest", folder / "latest");
  EXPECT_TRUE(CheckpointReader::any(folder.path()));
  CheckpointReader::Options options;
  std::string said;
  options.on_fallback = [&](const std::string& text) { said += text; };
  EXPECT_EQ(CheckpointReader::open(folder.path(), options).step(), 1);
  EXPECT_NE(said.find("Too many levels of symbolic links"), std::string::npos) << said;
  save(folder.path(), 2);
  EXPECT_EQ(CheckpointReader::open(folder.path()).step(), 2);
}

TEST(Checkpoint, DamagedLatestIsNamed) {
  const TemporaryDirectory folder;
  save(folder.path(), 1);
  for (const char* text :
       {"", "garbage", "../../etc", "step-00000001x", "step-1", "step-99999999999999999999999"}) {
    SCOPED_TRACE(text);
    write_bytes(folder / "latest", text);
    expect_error(ErrorKind::kCheckpoint, {"latest", "expected the name of a checkpoint folder"},
                 [&] { CheckpointReader::open(folder.path()); });
    CheckpointReader::Options options;
    int said = 0;
    options.on_fallback = [&](const std::string&) { ++said; };
    EXPECT_EQ(CheckpointReader::open(folder.path(), options).step(), 1);
    EXPECT_EQ(said, 2);
  }
}

TEST(Checkpoint, WhenAllAreDamagedTheFallbackFails) {
  const TemporaryDirectory folder;
  flip_bit(save(folder.path(), 1) / "state.json", 2);
  flip_bit(save(folder.path(), 2) / "state.json", 2);
  CheckpointReader::Options options;
  std::vector<std::string> said;
  options.on_fallback = [&](const std::string& text) { said.push_back(text); };
  expect_error(ErrorKind::kCheckpoint, {"no sound checkpoint", "step-00000001"},
               [&] { CheckpointReader::open(folder.path(), options); });
  EXPECT_EQ(said.size(), 2U);
}

TEST(Checkpoint, ChecksumsAreCheckedAtFirstUseWhenNotBefore) {
  const TemporaryDirectory folder;
  const fs::path checkpoint = save(folder.path(), 1);
  flip_bit(checkpoint / "model.safetensors", 300);
  const CheckpointReader reader = CheckpointReader::open(checkpoint, {false, {}});
  EXPECT_EQ(reader.text("state.json"), "{\"step\": 1}");
  expect_error(ErrorKind::kCheckpoint, {"model.safetensors", "is damaged"},
               [&] { reader.tensors("model.safetensors"); });
}

}  // namespace
}  // namespace drrl
