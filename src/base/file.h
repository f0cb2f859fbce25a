#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace megalodon {

// Errors of this header are request errors that name the path, for reading, and work errors for writing.

// A whole file, mapped read-only. Movable. An empty file maps to an empty span. Files must not be cut short
// while they are mapped: reading beyond their end is a signal.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// A whole file, or all that comes from a pipe.
std::string read_file(const std::filesystem::path& path);

// A file that appears whole or not at all: written beside its place (`path`.tmp-XXXXXXXX), and by commit()
// flushed, fsynced, renamed over `path`, and the folder fsynced. Destroyed without commit(), or after a
// failed write, it removes what it wrote and leaves what was at `path` alone. A path that is not a regular
// file (a device, a pipe) is refused.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  void commit();

 private:
  [[noreturn]] void fail(const char* action, int error);
  void flush();
  void discard();
  std::filesystem::path path_, temporary_;
  std::string buffer_;
  int descriptor_ = -1;
};

void write_file_atomically(const std::filesystem::path& path, std::string_view text);

// Removes what AtomicFile was writing in `folder` and below when its process was killed. Nobody may be
// writing there.
void remove_unfinished_files(const std::filesystem::path& folder);

// Renames `from` to `to` (a folder too) and fsyncs the folder that holds it.
void rename_durably(const std::filesystem::path& from, const std::filesystem::path& to);

// Appends whole lines to a file (metrics.jsonl): each line is one write. A last line without its end, left by
// a crash, is cut off at opening.
class LineAppender {
 public:
  explicit LineAppender(const std::filesystem::path& path);
  LineAppender(const LineAppender&) = delete;
  LineAppender& operator=(const LineAppender&) = delete;
  ~LineAppender();
  void append(std::string_view line);  // without its newline

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
};

// Exclusive use of a folder by this process for as long as it lives (flock on FOLDER/.lock); a request error
// naming the folder where another process holds it. Crashes release it.
class FolderLock {
 public:
  explicit FolderLock(const std::filesystem::path& folder);
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;
  ~FolderLock();

 private:
  int descriptor_ = -1;
};

}  // namespace megalodon
