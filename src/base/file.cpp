#include "base/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/hash.h"

namespace megalodon {
namespace {

std::string reason(int error) {
  return std::strerror(error);
}

// Closes what it holds.
class Descriptor {
 public:
  explicit Descriptor(int descriptor) : descriptor_(descriptor) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  int get() const { return descriptor_; }

 private:
  int descriptor_;
};

[[noreturn]] void fail_reading(const std::filesystem::path& path, int error) {
  if (error == ENOENT || error == ENOTDIR) fail_request("file not found", path.string(), "check the path");
  if (error == EISDIR) fail_request("a folder where a file is needed", path.string(), "name a file");
  fail_request("file cannot be read", path.string(), reason(error));
}

[[noreturn]] void fail_writing(const char* action, const std::filesystem::path& path, int error) {
  std::string what_to_do = reason(error);
  if (error == ENOSPC || error == EDQUOT) what_to_do += "; free some space";
  fail_work(std::string("cannot ") + action, path.string(), what_to_do);
}

int open_to_read(const std::filesystem::path& path, struct stat* status) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail_reading(path, errno);
  if (::fstat(descriptor, status) != 0 || S_ISDIR(status->st_mode)) {
    const int error = S_ISDIR(status->st_mode) ? EISDIR : errno;
    ::close(descriptor);
    fail_reading(path, error);
  }
  return descriptor;
}

// Writes everything or returns the errno of the failure.
int write_all(int descriptor, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    bytes.remove_prefix(static_cast<std::size_t>(written));
  }
  return 0;
}

std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

void sync_folder_of(const std::filesystem::path& path) {
  const std::filesystem::path folder = folder_of(path);
  const Descriptor descriptor(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (descriptor.get() < 0) fail_writing("open folder", folder, errno);
  // EINVAL: a file system whose folders need no fsync
  if (::fsync(descriptor.get()) != 0 && errno != EINVAL) fail_writing("flush folder", folder, errno);
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) : path_(path) {
  struct stat status{};
  const Descriptor descriptor(open_to_read(path, &status));
  if (!S_ISREG(status.st_mode)) fail_request("not a regular file", path.string(), "copy it to a file first");
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ == 0) return;
  void* data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor.get(), 0);
  if (data == MAP_FAILED) fail_reading(path, errno);
  data_ = static_cast<const std::byte*>(data);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

std::string read_file(const std::filesystem::path& path) {
  struct stat status{};
  const Descriptor descriptor(open_to_read(path, &status));
  constexpr std::size_t block = 1 << 16;
  std::string text;
  if (S_ISREG(status.st_mode)) text.reserve(static_cast<std::size_t>(status.st_size) + block);
  for (std::size_t size = 0;;) {
    text.resize(size + block);
    const ssize_t got = ::read(descriptor.get(), text.data() + size, block);
    if (got < 0) {
      if (errno == EINTR) continue;
      fail_reading(path, errno);
    }
    size += static_cast<std::size_t>(got);
    if (got == 0) {
      text.resize(size);
      return text;
    }
  }
}

namespace {
constexpr std::string_view kTemporary = ".tmp-";  // and 8 random digits
}  // namespace

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  // Renaming over a device or a pipe would destroy it.
  std::error_code error;
  const auto status = std::filesystem::status(path_, error);
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    fail_request("not a regular file", path_.string(), "name a file that may be replaced");
  }
  std::random_device random;
  do {
    temporary_ = path_;
    temporary_ += std::string(kTemporary) + hex(random()).substr(8);
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
  } while (descriptor_ < 0 && errno == EEXIST);
  if (descriptor_ < 0) fail_writing("create file", path_, errno);
}

AtomicFile::~AtomicFile() {
  discard();
}

void AtomicFile::discard() {
  if (descriptor_ < 0) return;
  ::close(std::exchange(descriptor_, -1));
  ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* action, int error) {
  discard();
  fail_writing(action, path_, error);
}

void AtomicFile::flush() {
  if (descriptor_ < 0) fail("write file", EBADF);  // a write or the commit came before
  if (const int error = write_all(descriptor_, buffer_)) fail("write file", error);
  buffer_.clear();
}

void AtomicFile::write(std::string_view text) {
  constexpr std::size_t capacity = 1 << 16;
  if (buffer_.size() + text.size() > capacity) flush();
  if (text.size() < capacity) {
    buffer_.append(text);
  } else if (const int error = write_all(descriptor_, text)) {
    fail("write file", error);
  }
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  write(std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
}

void AtomicFile::commit() {
  flush();
  if (::fsync(descriptor_) != 0) fail("flush file", errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("replace file", errno);
  ::close(std::exchange(descriptor_, -1));
  sync_folder_of(path_);
}

void write_file_atomically(const std::filesystem::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void remove_unfinished_files(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> unfinished;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file() && entry.path().filename().string().find(kTemporary) != std::string::npos)
      unfinished.push_back(entry.path());
  }
  for (const auto& path : unfinished) std::filesystem::remove(path);
}

void rename_durably(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) fail_writing("rename to", to, errno);
  sync_folder_of(to);
  if (folder_of(from) != folder_of(to)) sync_folder_of(from);
}

LineAppender::LineAppender(const std::filesystem::path& path) : path_(path) {
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (descriptor_ < 0) fail_writing("open file", path, errno);
  // Cut off a last line without its end.
  off_t size = ::lseek(descriptor_, 0, SEEK_END);
  const off_t whole = size;
  for (char last = 0; size > 0; --size) {
    if (::pread(descriptor_, &last, 1, size - 1) != 1 || last == '\n') break;
  }
  if (size != whole && ::ftruncate(descriptor_, size) != 0) {
    const int error = errno;
    ::close(descriptor_);
    fail_writing("repair file", path, error);
  }
}

LineAppender::~LineAppender() {
  ::close(descriptor_);
}

void LineAppender::append(std::string_view line) {
  const off_t size = ::lseek(descriptor_, 0, SEEK_END);
  std::string whole(line);
  whole += '\n';
  if (const int error = write_all(descriptor_, whole)) {
    // Leave no half line; should that fail too, the next opening cuts it off.
    [[maybe_unused]] const int ignored = size >= 0 ? ::ftruncate(descriptor_, size) : 0;
    fail_writing("append to file", path_, error);
  }
}

FolderLock::FolderLock(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / ".lock";
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor_ < 0) fail_writing("create file", path, errno);
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) == 0) return;
  const int error = errno;
  ::close(descriptor_);
  if (error == EWOULDBLOCK) {
    fail_request("folder in use by another process", folder.string(),
                 "wait until it has ended, or choose another folder");
  }
  fail_writing("lock folder", folder, error);
}

FolderLock::~FolderLock() {
  ::close(descriptor_);
}

}  // namespace megalodon
