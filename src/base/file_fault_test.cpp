// Every system call of a write fails once. The linker sends the calls of file.cpp here (--wrap).
#include <fcntl.h>
#include <sys/types.h>

#include <cerrno>
#include <cstdarg>
#include <cstring>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/safetensors.h"
#include "base/testing.h"

namespace {

struct Faults {
  std::vector<std::string> calls;  // in order
  int fail_at = -1;                // the index of the call that fails ...
  int error = 0;                   // ... with this errno; 0: a write that takes one byte, then ENOSPC
} faults;

bool counts = false;

// True if the call that is being made is the one to fail.
bool next(const char* name) {
  if (!counts) return false;
  faults.calls.emplace_back(name);
  errno = faults.error;
  return static_cast<int>(faults.calls.size()) - 1 == faults.fail_at;
}

}  // namespace

// NOLINTBEGIN(bugprone-reserved-identifier): the names that --wrap gives
extern "C" {
int __real_open(const char* path, int flags, mode_t mode);
ssize_t __real_write(int descriptor, const void* data, size_t size);
int __real_fsync(int descriptor);
int __real_rename(const char* from, const char* to);

int __wrap_open(const char* path, int flags, ...) {
  mode_t mode = 0;
  if (flags & O_CREAT) {
    va_list arguments;
    va_start(arguments, flags);
    mode = va_arg(arguments, mode_t);
    va_end(arguments);
  }
  return next((flags & O_DIRECTORY) ? "open folder" : "open") ? -1 : __real_open(path, flags, mode);
}

ssize_t __wrap_write(int descriptor, const void* data, size_t size) {
  if (!next("write")) return __real_write(descriptor, data, size);
  if (faults.error != 0) return -1;
  faults.error = ENOSPC;
  ++faults.fail_at;
  return __real_write(descriptor, data, 1);
}

int __wrap_fsync(int descriptor) {
  return next("fsync") ? -1 : __real_fsync(descriptor);
}

int __wrap_rename(const char* from, const char* to) {
  return next("rename") ? -1 : __real_rename(from, to);
}
}
// NOLINTEND(bugprone-reserved-identifier)

namespace megalodon {
namespace {

using testing::contains;

// Runs `body` with one fault; its error message, or "" where it came through.
template <class F>
std::string with_fault(int fail_at, int error, F&& body) {
  faults = {{}, fail_at, error};
  counts = true;
  std::string message;
  try {
    body();
  } catch (const Error& failure) {
    message = failure.what();
    EXPECT_EQ(failure.kind(), Error::Kind::work);
  }
  counts = false;
  return message;
}

class Faulty : public ::testing::Test {
 protected:
  void write_old() { testing::write_text(path_, "old"); }

  // The whole old file or the whole new one, and nothing beside it.
  void expect_whole(bool is_new) {
    EXPECT_EQ(read_file(path_), is_new ? text_ : "old");
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_.path()), {}), 1);
  }

  testing::TemporaryFolder folder_;
  std::filesystem::path path_ = folder_ / "out";
  std::string text_ = std::string(100'000, 'n') + "end";
};

TEST_F(Faulty, OrderOfAnAtomicWrite) {
  write_old();
  EXPECT_EQ(with_fault(-1, 0, [&] { write_file_atomically(path_, text_); }), "");
  EXPECT_EQ(faults.calls,
            (std::vector<std::string>{"open", "write", "fsync", "rename", "open folder", "fsync"}));
  expect_whole(true);
}

TEST_F(Faulty, EveryFailureOfAnAtomicWrite) {
  for (const int error : {EIO, ENOSPC, EDQUOT}) {
    for (int at = 0; at < 6; ++at) {
      write_old();
      const std::string message = with_fault(at, error, [&] { write_file_atomically(path_, text_); });
      EXPECT_TRUE(contains(message, "cannot ") && contains(message, std::strerror(error))) << at;
      EXPECT_TRUE(contains(message, folder_.path().string()));
      EXPECT_EQ(contains(message, "free some space"), error != EIO) << message;
      expect_whole(at > 3);  // once renamed it is there, though not yet known to be on disk
    }
  }
}

TEST_F(Faulty, ShortAndInterruptedWrites) {
  write_old();
  EXPECT_TRUE(contains(with_fault(1, 0, [&] { write_file_atomically(path_, text_); }), "No space left"));
  expect_whole(false);
  EXPECT_EQ(with_fault(1, EINTR, [&] { write_file_atomically(path_, text_); }), "");
  expect_whole(true);
}

TEST_F(Faulty, EveryFailureOfSafetensors) {
  const std::vector<std::byte> data(200'000);
  const TensorBytes tensors[] = {{"a", TensorType::u8, {200'000}, data},
                                 {"b", TensorType::u8, {4}, {data.data(), 4}}};
  int at = 0;
  for (;; ++at) {
    write_old();
    if (with_fault(at, ENOSPC, [&] { write_safetensors(path_, tensors); }).empty()) break;
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_.path()), {}), 1) << at;
    if (at < 6) EXPECT_EQ(read_file(path_), "old") << at;  // the rename is call 5
  }
  EXPECT_EQ(at, 8);  // open, three writes, fsync, rename, open folder, fsync
  EXPECT_EQ(SafetensorsFile(path_).header().tensors.size(), 2u);
}

TEST_F(Faulty, AppendedLinesStayWhole) {
  LineAppender lines(path_);
  lines.append("one");
  EXPECT_TRUE(
      contains(with_fault(0, 0, [&] { lines.append("two"); }), "No space left on device; free some space"));
  EXPECT_EQ(read_file(path_), "one\n");
  lines.append("three");
  EXPECT_EQ(read_file(path_), "one\nthree\n");
}

TEST_F(Faulty, RenameOfAFolder) {
  const auto from = folder_ / "from", to = folder_ / "to";
  std::filesystem::create_directory(from);
  EXPECT_TRUE(contains(with_fault(0, EIO, [&] { rename_durably(from, to); }), "cannot rename to"));
  EXPECT_TRUE(std::filesystem::exists(from));
  EXPECT_EQ(with_fault(-1, 0, [&] { rename_durably(from, to); }), "");
  EXPECT_EQ(faults.calls, (std::vector<std::string>{"rename", "open folder", "fsync"}));
}

}  // namespace
}  // namespace megalodon
