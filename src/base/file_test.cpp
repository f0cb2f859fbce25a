#include "base/file.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <thread>

#include "base/testing.h"

namespace megalodon {
namespace {

using testing::contains;
using testing::request_error;
using testing::TemporaryFolder;
using testing::work_error;
using testing::write_text;

std::size_t files_in(const std::filesystem::path& folder) {
  return static_cast<std::size_t>(
      std::distance(std::filesystem::directory_iterator(folder), std::filesystem::directory_iterator()));
}

// Runs `body` in a child process in which no file may grow beyond `bytes`; its exit code.
template <class F>
int exit_code_with_file_limit(rlim_t bytes, F&& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{bytes, bytes};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    int code = 99;
    try {
      code = body();
    } catch (const Error& error) {
      code = contains(error.what(), "File too large") ? static_cast<int>(error.kind()) : 98;
    }
    ::_exit(code);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(MappedFile, HoldsTheBytes) {
  const TemporaryFolder folder;
  write_text(folder / "a", "hello");
  MappedFile file(folder / "a");
  EXPECT_EQ(file.text(), "hello");
  MappedFile moved(std::move(file));
  EXPECT_EQ(moved.text(), "hello");
  write_text(folder / "b", "other");
  moved = MappedFile(folder / "b");
  EXPECT_EQ(moved.text(), "other");
  EXPECT_EQ(moved.path(), folder / "b");
}

TEST(MappedFile, EmptyFileIsAnEmptySpan) {
  const TemporaryFolder folder;
  write_text(folder / "empty", "");
  EXPECT_TRUE(MappedFile(folder / "empty").bytes().empty());
  EXPECT_EQ(read_file(folder / "empty"), "");
}

TEST(Reading, NamesWhatIsWrongWithThePath) {
  const TemporaryFolder folder;
  write_text(folder / "file", "x");
  for (const auto& read : {+[](const std::filesystem::path& path) { read_file(path); },
                           +[](const std::filesystem::path& path) { MappedFile{path}; }}) {
    EXPECT_EQ(request_error([&] { read(folder / "none"); }),
              "file not found (" + (folder / "none").string() + "): check the path");
    EXPECT_TRUE(contains(request_error([&] { read(folder / "file/below"); }), "file not found"));
    EXPECT_EQ(request_error([&] { read(folder.path()); }),
              "a folder where a file is needed (" + folder.path().string() + "): name a file");
    EXPECT_TRUE(contains(request_error([&] { read(std::string(5000, 'x')); }), "File name too long"));
  }
}

TEST(Reading, UnreadableFile) {
  const TemporaryFolder folder;
  write_text(folder / "secret", "x");
  std::filesystem::permissions(folder / "secret", std::filesystem::perms::none);
  const auto open_secret = [&] {
    const std::string message = request_error([&] { read_file(folder / "secret"); });
    return contains(message, "file cannot be read") && contains(message, "Permission denied");
  };
  if (::geteuid() != 0) {
    EXPECT_TRUE(open_secret());
    return;
  }
  // root reads everything: try as another user, who can see the folder
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0755));
  const pid_t child = ::fork();
  if (child == 0) ::_exit(::setuid(65534) == 0 && open_secret() ? 0 : 1);
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

TEST(Reading, PipesAreReadButNotMapped) {
  const TemporaryFolder folder;
  const auto pipe = folder / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  const std::string text(200'000, 'p');
  {
    std::jthread writer([&] { write_text(pipe, text); });
    EXPECT_EQ(read_file(pipe), text);
  }
  EXPECT_TRUE(contains(request_error([] { MappedFile{"/dev/null"}; }), "not a regular file"));
}

TEST(AtomicFile, AppearsWholeAtCommit) {
  const TemporaryFolder folder;
  const auto path = folder / "out";
  write_text(path, "old");
  std::string expected;
  {
    AtomicFile file(path);
    for (int i = 0; i < 3000; ++i) {
      const std::string line = "line " + std::to_string(i) + "\n";
      file.write(line);
      expected += line;
    }
    const std::string large(300'000, 'x');
    file.write(large);
    expected += large;
    EXPECT_EQ(read_file(path), "old");
    file.commit();
  }
  EXPECT_EQ(read_file(path), expected);
  EXPECT_EQ(files_in(folder.path()), 1u);
}

TEST(AtomicFile, WithoutCommitLeavesNothing) {
  const TemporaryFolder folder;
  write_text(folder / "out", "old");
  {
    AtomicFile(folder / "out").write("new");
  }
  EXPECT_EQ(read_file(folder / "out"), "old");
  EXPECT_EQ(files_in(folder.path()), 1u);
}

TEST(AtomicFile, FullDiskKeepsTheOldFile) {
  const TemporaryFolder folder;
  const auto path = folder / "out";
  write_text(path, "old");
  // Small writes fail when the buffer is flushed, by a later write or by commit(); large ones at once.
  for (const std::size_t piece : {std::size_t{1000}, std::size_t{9999}, std::size_t{500'000}}) {
    EXPECT_EQ(exit_code_with_file_limit(8192,
                                        [&] {
                                          AtomicFile file(path);
                                          for (std::size_t written = 0; written < 20'000; written += piece)
                                            file.write(std::string(piece, 'x'));
                                          file.commit();
                                          return 0;
                                        }),
              static_cast<int>(Error::Kind::work));
    EXPECT_EQ(read_file(path), "old");
    EXPECT_EQ(files_in(folder.path()), 1u);
  }
}

TEST(AtomicFile, CannotBeCommittedAfterAFailedWrite) {
  const TemporaryFolder folder;
  EXPECT_EQ(exit_code_with_file_limit(8192,
                                      [&] {
                                        AtomicFile file(folder / "out");
                                        work_error([&] { file.write(std::string(100'000, 'x')); });
                                        work_error([&] {
                                          file.write("small");
                                          file.commit();
                                        });
                                        return ::testing::Test::HasFailure() ? 1 : 0;
                                      }),
            0);
  EXPECT_EQ(files_in(folder.path()), 0u);
}

TEST(AtomicFile, RefusesWhatItWouldDestroy) {
  const TemporaryFolder folder;
  EXPECT_TRUE(contains(request_error([] { AtomicFile{"/dev/null"}; }), "not a regular file (/dev/null)"));
  EXPECT_TRUE(contains(request_error([&] { AtomicFile{folder.path()}; }), "not a regular file"));
  EXPECT_TRUE(
      contains(work_error([&] { AtomicFile{folder / "no/such/folder"}; }), "No such file or directory"));
}

TEST(RenameDurably, MovesAFolder) {
  const TemporaryFolder folder;
  std::filesystem::create_directory(folder / "a");
  write_text(folder / "a/file", "x");
  rename_durably(folder / "a", folder / "b");
  EXPECT_EQ(read_file(folder / "b/file"), "x");
  EXPECT_TRUE(contains(work_error([&] { rename_durably(folder / "a", folder / "c"); }), "cannot rename to"));
}

TEST(LineAppender, AppendsAndRepairs) {
  const TemporaryFolder folder;
  const auto path = folder / "lines";
  {
    LineAppender(path).append("one");
  }
  {
    LineAppender(path).append("two");
  }
  EXPECT_EQ(read_file(path), "one\ntwo\n");
  write_text(path, "one\ntwo\nto");
  {
    LineAppender(path).append("three");
  }
  EXPECT_EQ(read_file(path), "one\ntwo\nthree\n");
  write_text(path, "torn");
  {
    LineAppender(path).append("first");
  }
  EXPECT_EQ(read_file(path), "first\n");
}

TEST(LineAppender, FullDevice) {
  LineAppender lines("/dev/full");
  EXPECT_EQ(work_error([&] { lines.append("x"); }),
            "cannot append to file (/dev/full): No space left on device; free some space");
}

TEST(LineAppender, FullDiskLeavesWholeLines) {
  const TemporaryFolder folder;
  const auto path = folder / "lines";
  EXPECT_EQ(exit_code_with_file_limit(50,
                                      [&] {
                                        LineAppender lines(path);
                                        lines.append(std::string(29, 'a'));
                                        lines.append(std::string(29, 'b'));
                                        return 0;
                                      }),
            static_cast<int>(Error::Kind::work));
  EXPECT_EQ(read_file(path), std::string(29, 'a') + "\n");
}

TEST(FolderLock, HoldsOneProcessOut) {
  const TemporaryFolder folder;
  {
    const FolderLock lock(folder.path());
    EXPECT_EQ(request_error([&] { FolderLock{folder.path()}; }),
              "folder in use by another process (" + folder.path().string() +
                  "): wait until it has ended, or choose another folder");
  }
  const FolderLock again(folder.path());
  EXPECT_TRUE(contains(work_error([&] { FolderLock{folder / "none"}; }), "No such file"));
}

}  // namespace
}  // namespace megalodon
