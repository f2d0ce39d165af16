// Files and folders as core/io/file_io.h writes them: what is replaced, what is not, and who may
// write where.
#include "core/io/file_io.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>

#include <future>
#include <thread>

#include "tests/support/io_support.h"

static bool takes_locks = true;

/// In place of the system's: a file system that takes no locks, if the test says so.
extern "C" int flock(int descriptor, int operation) noexcept {
  errno = ENOLCK;
  return takes_locks ? static_cast<int>(syscall(SYS_flock, descriptor, operation)) : -1;
}

namespace drrl {
namespace {

namespace fs = std::filesystem;
using test::expect_error;
using test::listing;
using test::read_bytes;
using test::TemporaryDirectory;
using test::write_bytes;

void ignore(const std::string& /*warning*/) {}

TEST(FileWriter, FollowsLinks) {
  const TemporaryDirectory folder;
  fs::create_directory(folder / "far");
  write_bytes(folder / "far/real", "old");
  fs::create_symlink("far/real", folder / "one");
  fs::create_symlink("one", folder / "two");
  fs::create_symlink(folder / "far/new", folder / "to nothing yet");
  write_text(folder / "two", "new");
  write_text(folder / "to nothing yet", "made");
  EXPECT_TRUE(fs::is_symlink(folder / "one") && fs::is_symlink(folder / "two") &&
              fs::is_symlink(folder / "to nothing yet"));
  EXPECT_EQ(read_bytes(folder / "far/real"), "new");
  EXPECT_EQ(read_bytes(folder / "far/new"), "made");
  EXPECT_EQ(listing(folder / "far"), (std::vector<std::string>{"new", "real"}));
  fs::create_symlink("loop", folder / "loop");
  expect_error(ErrorKind::kStorage, {"loop", "cannot write"}, [&] { FileWriter(folder / "loop"); });
  expect_error(ErrorKind::kStorage, {"far", "is a folder"}, [&] { FileWriter(folder / "far"); });
  expect_error(ErrorKind::kStorage, {"expected the name of a file"},
               [&] { FileWriter(folder.path() / ""); });
}

TEST(FileWriter, WritesIntoPipesAndDevices) {
  const TemporaryDirectory folder;
  const std::string pipe = (folder / "pipe").string();
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  check_writable(pipe);
  expect_error(ErrorKind::kStorage, {"pipe", "nobody reads it"}, [&] { write_text(pipe, "lost"); });
  const int reader = ::open(pipe.c_str(), O_RDONLY | O_NONBLOCK);
  check_writable(pipe);
  write_text(pipe, "through", [](const fs::path&) { FAIL() << "a pipe cannot be read back"; });
  char text[32] = "";
  EXPECT_EQ(::read(reader, text, sizeof(text)), 7);
  EXPECT_STREQ(text, "through");
  ::close(reader);
  EXPECT_TRUE(fs::is_fifo(pipe));
  expect_error(ErrorKind::kStorage, {"/dev/full", "No space left"},
               [] { write_text("/dev/full", "x"); });
  if (mknod((folder / "null").c_str(), S_IFCHR | 0666, makedev(1, 3)) == 0) {
    write_text(folder / "null", "x");
    EXPECT_TRUE(fs::is_character_file(folder / "null"));
  }
}

TEST(FileWriter, OwnStdoutIsWrittenInto) {
  const TemporaryDirectory folder;
  const pid_t child = fork();
  if (child == 0) {
    std::freopen((folder / "out").c_str(), "w", stdout);
    std::printf("before, ");
    write_text("/dev/stdout", "between, ");
    write_text(folder / "out", "by its name, ");
    std::printf("after");
    std::fflush(stdout);
    _exit(0);
  }
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_EQ(read_bytes(folder / "out"), "before, between, by its name, after");
}

TEST(FileWriter, WhatItsReaderRefusesReplacesNothing) {
  const TemporaryDirectory folder;
  const fs::path file = folder / "file";
  write_text(file, "old");
  const FileCheck refuse = [&](const fs::path& written) {
    EXPECT_EQ(read_bytes(written), "new");
    raise(ErrorKind::kModel, written, " holds a new thing");
  };
  expect_error(ErrorKind::kModel,
               {"was not written", "\"" + file.string() + "\" holds a new thing"},
               [&] { write_text(file, "new", refuse); });
  EXPECT_EQ(read_bytes(file), "old");
  EXPECT_EQ(listing(folder.path()), std::vector<std::string>{"file"});
}

TEST(FileWriter, LeftoversGoAndLiveWritersStay) {
  const TemporaryDirectory folder;
  const fs::path file = folder / "file";
  write_bytes(folder / ".file.tmp-20597", "of a killed process");
  write_bytes(folder / ".file.tmp-notes", "of somebody");
  FileWriter live(file), other(file);
  live.write("live");
  write_text(file, "written");
  EXPECT_EQ(listing(folder.path()).size(), 4U) << "two live ones, the notes and the file";
  EXPECT_FALSE(fs::exists(folder / ".file.tmp-20597"));
  live.commit();
  EXPECT_EQ(read_bytes(file), "live");
  EXPECT_EQ(listing(folder.path()).size(), 3U);
  const std::string longest(255, 'n');
  write_text(folder / longest, "x");
  EXPECT_EQ(read_bytes(folder / longest), "x");
}

TEST(CheckWritable, LeavesNoTrace) {
  const TemporaryDirectory folder;
  write_bytes(folder / "file", "kept");
  fs::create_symlink("nowhere", folder / "link");
  check_writable(folder / "file");
  check_writable(folder / "new");
  check_writable_folder(folder.path());
  check_writable_folder(folder / "new/deep/er/");
  expect_error(ErrorKind::kStorage, {"No such file or directory"},
               [&] { check_writable(folder / "no/file"); });
  expect_error(ErrorKind::kStorage, {"is a folder"}, [&] { check_writable(folder.path()); });
  expect_error(ErrorKind::kStorage, {"file\" is not a folder"},
               [&] { check_writable_folder(folder / "file/deep/er"); });
  expect_error(ErrorKind::kStorage, {"link\" is a link to nothing"},
               [&] { check_writable_folder(folder / "link/deep/er"); });
  expect_error(ErrorKind::kStorage, {"cannot create"},
               [&] { check_writable_folder("/proc/deep/er"); });
  EXPECT_EQ(listing(folder.path()), (std::vector<std::string>{"file", "link"}));
  EXPECT_EQ(read_bytes(folder / "file"), "kept");
}

/// Runs in a process of its own, which is killed once it has done `action`, before it can clean up.
void die_after(const std::function<void()>& action) {
  const pid_t child = fork();
  if (child == 0) {
    action();
    testing::Test::HasFailure() ? _exit(1) : static_cast<void>(::raise(SIGKILL));
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status)) << "see above";
}

TEST(FolderLock, ASecondOneIsToldOfTheFirst) {
  const TemporaryDirectory folder;
  const fs::path output = folder / "out";
  {
    const FolderLock lock(output, "--output", ignore);
    const std::string me = "process " + std::to_string(getpid()) + " on ";
    die_after([&] {
      expect_error(ErrorKind::kStorage, {output.string(), me, " since 20", "--output"},
                   [&] { FolderLock(output, "--output", ignore); });
    });
    EXPECT_TRUE(read_bytes(output / ".lock").starts_with(me))
        << "who was refused has changed nothing";
  }
  EXPECT_NO_THROW(FolderLock(output, "--output", ignore));
}

TEST(FolderLock, DiesWithItsProcess) {
  const TemporaryDirectory folder;
  die_after([&] { new FolderLock(folder.path(), "--output", ignore); });
  ASSERT_TRUE(fs::exists(folder / ".lock"));
  EXPECT_NO_THROW(FolderLock(folder.path(), "--output", ignore));
  // A program that the killed process had started lives on.
  die_after([&] {
    new FolderLock(folder.path(), "--output", ignore);
    ASSERT_EQ(std::system(("sleep 20 & echo $! > " + (folder / "sleeper").string()).c_str()), 0);
  });
  EXPECT_NO_THROW(FolderLock(folder.path(), "--output", ignore));
  EXPECT_EQ(kill(std::stoi(read_bytes(folder / "sleeper")), SIGKILL), 0);
}

TEST(FolderLock, WithoutLocksItWarnsAndGoesOn) {
  const TemporaryDirectory folder;
  write_bytes(folder / ".file.tmp-1", "perhaps of a live writer");
  takes_locks = false;
  std::string said;
  EXPECT_NO_THROW(
      FolderLock(folder.path(), "--output", [&](const std::string& text) { said = text; }));
  write_text(folder / "file", "x");
  takes_locks = true;
  EXPECT_NE(said.find("takes no locks (No locks available)"), std::string::npos) << said;
  EXPECT_EQ(listing(folder.path()), (std::vector<std::string>{".file.tmp-1", ".lock", "file"}));
}

TEST(FolderLock, WaitsForWhoIsDying) {
  const TemporaryDirectory folder;
  auto first = std::make_unique<FolderLock>(folder.path(), "--output", ignore);
  const auto dies = std::async(std::launch::async, [&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    first.reset();
  });
  EXPECT_NO_THROW(FolderLock(folder.path(), "--output", ignore));
}

}  // namespace
}  // namespace drrl
