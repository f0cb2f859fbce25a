#include "report/tensorboard.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include "base/error.h"
#include "base/hash.h"

namespace megalodon::report {
namespace {

constexpr char kPrefix[] = "events.out.tfevents.";

// Field numbers of tensorflow/core/util/event.proto, framework/summary.proto and framework/tensor.proto.
namespace event {
constexpr int wall_time = 1, step = 2, file_version = 3, summary = 5, session_log = 7;
}
namespace session_log {
constexpr int status = 1;
constexpr std::uint64_t start = 1;
}  // namespace session_log
namespace summary {
constexpr int value = 1;
}
namespace value {
constexpr int tag = 1, simple_value = 2, tensor = 8, metadata = 9;
}
namespace metadata {
constexpr int plugin_data = 1, plugin_name = 1;
}
namespace tensor {
constexpr int type = 1, shape = 2, string_values = 8, dimension = 2, size = 1;
constexpr std::uint64_t type_string = 7;
}  // namespace tensor

template <class T>
void append_little_endian(std::string& out, T number) {
  static_assert(std::endian::native == std::endian::little);
  char bytes[sizeof(T)];
  std::memcpy(bytes, &number, sizeof(T));
  out.append(bytes, sizeof(T));
}

void append_varint(std::string& out, std::uint64_t number) {
  for (; number >= 0x80; number /= 0x80) out.push_back(static_cast<char>(number % 0x80 + 0x80));
  out.push_back(static_cast<char>(number));
}

// Protobuf's wire format: a key of field number and wire type, then the content.
enum Wire : std::uint64_t { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

void append_key(std::string& out, int field, Wire wire) {
  append_varint(out, static_cast<std::uint64_t>(field) * 8 + wire);
}

void append_integer(std::string& out, int field, std::uint64_t number) {
  append_key(out, field, Wire::varint);
  append_varint(out, number);
}

void append_double(std::string& out, int field, double number) {
  append_key(out, field, Wire::fixed64);
  append_little_endian(out, number);
}

void append_float(std::string& out, int field, float number) {
  append_key(out, field, Wire::fixed32);
  append_little_endian(out, number);
}

// A string or a message within a message.
void append_bytes(std::string& out, int field, std::string_view content) {
  append_key(out, field, Wire::bytes);
  append_varint(out, content.size());
  out.append(content);
}

std::string event_of(std::int64_t step, double wall_time) {
  std::string out;
  append_double(out, event::wall_time, wall_time);
  append_integer(out, event::step, static_cast<std::uint64_t>(step));
  return out;
}

void append_summary(std::string& out, std::string_view value_message) {
  std::string message;
  append_bytes(message, summary::value, value_message);
  append_bytes(out, event::summary, message);
}

std::uint32_t masked_crc(std::string_view text) {
  const std::uint32_t crc = crc32c(std::as_bytes(std::span(text.data(), text.size())));
  return std::rotr(crc, 15) + 0xa282ead8u;
}

// The latest start time among the event files of `folder`; 0 where there are none.
long long latest_start(const std::filesystem::path& folder) {
  long long latest = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kPrefix)) {
      latest = std::max(latest, std::strtoll(name.c_str() + sizeof kPrefix - 1, nullptr, 10));
    }
  }
  return latest;
}

}  // namespace

EventWriter::EventWriter(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) fail_work("cannot make the folder: " + error.message(), folder.string(), "choose another one");
  const long long start = std::max(static_cast<long long>(wall_clock()), latest_start(folder));
  for (int number = 0; descriptor_ < 0 && number < 1000; ++number) {
    char name[64];
    std::snprintf(name, sizeof name, "%s%010lld.megalodon.%03d", kPrefix, start, number);
    path_ = folder / name;
    descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0644);
    if (descriptor_ < 0 && errno != EEXIST) break;
  }
  if (descriptor_ < 0) {
    fail_work(std::string("cannot create an event file: ") + std::strerror(errno), path_.string(),
              "check the folder's permissions and free space");
  }
  std::string version;
  append_double(version, event::wall_time, wall_clock());
  append_bytes(version, event::file_version, "brain.Event:2");
  write_event(version);
}

EventWriter::~EventWriter() {
  ::close(descriptor_);
}

void EventWriter::add_scalar(std::string_view tag, double number, std::int64_t step, double wall_time) {
  std::string message;
  append_bytes(message, value::tag, tag);
  append_float(message, value::simple_value, static_cast<float>(number));
  std::string out = event_of(step, wall_time);
  append_summary(out, message);
  write_event(out);
}

void EventWriter::add_text(std::string_view tag, std::string_view text, std::int64_t step, double wall_time) {
  std::string plugin;
  append_bytes(plugin, metadata::plugin_name, "text");
  std::string description;
  append_bytes(description, metadata::plugin_data, plugin);

  std::string dimension;
  append_integer(dimension, tensor::size, 1);
  std::string shape;
  append_bytes(shape, tensor::dimension, dimension);
  std::string content;
  append_integer(content, tensor::type, tensor::type_string);
  append_bytes(content, tensor::shape, shape);
  append_bytes(content, tensor::string_values, text);

  std::string message;
  append_bytes(message, value::tag, tag);
  append_bytes(message, value::tensor, content);
  append_bytes(message, value::metadata, description);
  std::string out = event_of(step, wall_time);
  append_summary(out, message);
  write_event(out);
}

void EventWriter::discard_from(std::int64_t step, double wall_time) {
  std::string session;
  append_integer(session, session_log::status, session_log::start);
  std::string out = event_of(step, wall_time);
  append_bytes(out, event::session_log, session);
  write_event(out);
}

// A record: length (u64), its masked CRC-32C, the payload, its masked CRC-32C.
void EventWriter::write_event(std::string_view payload) {
  std::string record;
  append_little_endian(record, static_cast<std::uint64_t>(payload.size()));
  append_little_endian(record, masked_crc(record));
  record.append(payload);
  append_little_endian(record, masked_crc(payload));
  for (std::string_view rest = record; !rest.empty();) {
    const ssize_t written = ::write(descriptor_, rest.data(), rest.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      fail_work(std::string("cannot write: ") + std::strerror(errno), path_.string(), "check the free space");
    }
    rest.remove_prefix(static_cast<std::size_t>(written));
  }
}

}  // namespace megalodon::report
