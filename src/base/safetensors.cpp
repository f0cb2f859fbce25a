#include "base/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <optional>
#include <set>

#include "base/error.h"
#include "base/json.h"

namespace megalodon {
namespace {

constexpr std::size_t most_header_bytes = 100'000'000, most_entries = 100'000, most_dimensions = 64;
constexpr std::size_t length_bytes = 8;  // the header's length, little-endian, before the header

struct TypeRow {
  TensorType type;
  std::string_view name;
  std::size_t size;
};
constexpr std::array<TypeRow, 10> types{{{TensorType::bool_, "BOOL", 1},
                                         {TensorType::u8, "U8", 1},
                                         {TensorType::i8, "I8", 1},
                                         {TensorType::i16, "I16", 2},
                                         {TensorType::i32, "I32", 4},
                                         {TensorType::i64, "I64", 8},
                                         {TensorType::f16, "F16", 2},
                                         {TensorType::bf16, "BF16", 2},
                                         {TensorType::f32, "F32", 4},
                                         {TensorType::f64, "F64", 8}}};

const TypeRow& row_of(TensorType type) {
  return types[static_cast<std::size_t>(type)];
}

std::string in_quotes(std::string_view name) {
  constexpr std::size_t longest = 80;
  return "'" + std::string(name.substr(0, longest)) + (name.size() > longest ? "...'" : "'");
}

// Bytes of a dense tensor, or nothing where that, or the product of the dimensions that are not 0, is beyond
// 63 bits.
std::optional<std::uint64_t> byte_count(TensorType type, std::span<const std::int64_t> shape) {
  std::uint64_t bytes = size_of(type);
  bool empty = false;
  for (const std::int64_t dimension : shape) {
    empty |= dimension == 0;
    if (__builtin_mul_overflow(bytes, std::max<std::uint64_t>(static_cast<std::uint64_t>(dimension), 1),
                               &bytes) ||
        bytes > std::uint64_t{INT64_MAX}) {
      return std::nullopt;
    }
  }
  return empty ? 0 : bytes;
}

// Takes the events of the JSON reader, which does not recurse. A header has one form only:
// {"__metadata__": {string: string}, NAME: {"dtype": string, "shape": [n ...], "data_offsets": [n, n]}}
class HeaderReader : public nlohmann::json_sax<Json> {
 public:
  HeaderReader(SafetensorsHeader& header, std::string_view where) : header_(header), where_(where) {}

  bool null() override { return refuse("null"); }
  bool boolean(bool) override { return refuse("a boolean"); }
  bool number_integer(number_integer_t) override { return refuse("a negative number"); }
  bool number_float(number_float_t, const string_t&) override {
    return refuse("a number that is no integer");
  }
  bool binary(binary_t&) override { return refuse("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (value > std::uint64_t{INT64_MAX}) return refuse("a number beyond 63 bits");
    if (place_ == Place::shape) {
      if (entry_.shape.size() == most_dimensions) fail("more than 64 dimensions");
      entry_.shape.push_back(static_cast<std::int64_t>(value));
    } else if (place_ == Place::offsets && offsets_ < 2) {
      (offsets_ == 0 ? entry_.begin : entry_.end) = value;
      ++offsets_;
    } else {
      return refuse("a number");
    }
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::metadata) {
      header_.metadata[field_] = std::move(value);
    } else if (place_ == Place::entry && field_ == "dtype") {
      const auto* row =
          std::find_if(types.begin(), types.end(), [&](const auto& t) { return t.name == value; });
      if (row == types.end()) fail("unknown element type " + in_quotes(value));
      entry_.type = row->type;
    } else {
      return refuse("a string");
    }
    return true;
  }

  bool key(string_t& value) override {
    if (place_ == Place::top) {
      name_ = std::move(value);
      if (header_.tensors.contains(name_) || (name_ == "__metadata__" && metadata_seen_)) {
        fail("entry " + in_quotes(name_) + " twice");
      }
      if (header_.tensors.size() == most_entries) fail("more than 100,000 tensors");
      return true;
    }
    field_ = std::move(value);
    if (place_ == Place::metadata) {
      if (header_.metadata.contains(field_)) fail("metadata " + in_quotes(field_) + " twice");
      if (header_.metadata.size() == most_entries) fail("more than 100,000 metadata entries");
      return true;
    }
    if (!fields_.insert(field_).second) fail("field " + in_quotes(field_) + " twice");
    if (field_ != "dtype" && field_ != "shape" && field_ != "data_offsets") {
      fail("unknown field " + in_quotes(field_));
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::outside) {
      place_ = Place::top;
    } else if (place_ == Place::top && name_ == "__metadata__") {
      metadata_seen_ = true;
      place_ = Place::metadata;
    } else if (place_ == Place::top) {
      entry_ = TensorInfo{};
      fields_.clear();
      offsets_ = 0;
      place_ = Place::entry;
    } else {
      return refuse("an object");
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::entry) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        if (!fields_.contains(field)) fail("no field '" + std::string(field) + "'");
      }
      header_.tensors.emplace(name_, std::move(entry_));
    }
    place_ = place_ == Place::top ? Place::outside : Place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::entry || field_ == "dtype") return refuse("an array");
    place_ = field_ == "shape" ? Place::shape : Place::offsets;
    return true;
  }

  bool end_array() override {
    if (place_ == Place::offsets && offsets_ != 2) fail("data_offsets are not two numbers");
    place_ = Place::entry;
    return true;
  }

  bool parse_error(std::size_t byte, const std::string&, const Json::exception&) override {
    fail_request(
        "malformed safetensors header", where_,
        "invalid JSON at byte " + std::to_string(length_bytes + (byte == 0 ? 0 : byte - 1)) + " of the file");
  }

 private:
  enum class Place { outside, top, metadata, entry, shape, offsets };

  [[noreturn]] void fail(const std::string& why) const {
    const bool in_tensor = place_ != Place::top && place_ != Place::metadata && place_ != Place::outside;
    fail_request("malformed safetensors header", where_,
                 in_tensor ? "tensor " + in_quotes(name_) + ": " + why : why);
  }

  bool refuse(const char* got) const {
    switch (place_) {
      case Place::outside:
        fail(std::string("expected an object, got ") + got);
      case Place::top:
        fail("entry " + in_quotes(name_) + ": expected an object, got " + got);
      case Place::metadata:
        fail("metadata " + in_quotes(field_) + ": expected a string, got " + got);
      case Place::entry:
        fail("field " + in_quotes(field_) + ": unexpected " + got);
      case Place::shape:
        fail(std::string("shape: expected a size, got ") + got);
      case Place::offsets:
        fail(std::string("data_offsets: expected two offsets, got ") + got);
    }
    return false;
  }

  SafetensorsHeader& header_;
  std::string_view where_;
  Place place_ = Place::outside;
  bool metadata_seen_ = false;
  std::string name_, field_;  // the entry, and the field or metadata key in it
  TensorInfo entry_{};
  std::set<std::string> fields_;
  int offsets_ = 0;
};

// Every tensor as long as its shape says; together they are the data, without holes or overlaps.
void check_layout(const SafetensorsHeader& header, std::uint64_t data_bytes, std::string_view where) {
  const auto fail = [&](std::string_view name, const std::string& why) {
    fail_request("malformed safetensors header", where, "tensor " + in_quotes(name) + ": " + why);
  };
  std::vector<std::pair<const TensorInfo*, const std::string*>> order;
  order.reserve(header.tensors.size());
  for (const auto& [name, info] : header.tensors) {
    if (info.begin > info.end) fail(name, "data_offsets out of order");
    if (info.end > data_bytes) {
      fail(name, "data up to byte " + std::to_string(info.end) + ", but the file holds " +
                     std::to_string(data_bytes) + "; is it truncated?");
    }
    const auto bytes = byte_count(info.type, info.shape);
    if (!bytes) {
      fail(name, "shape too large");
    } else if (*bytes != info.end - info.begin) {
      fail(name, "the shape needs " + std::to_string(*bytes) + " bytes, data_offsets give " +
                     std::to_string(info.end - info.begin));
    }
    order.emplace_back(&info, &name);
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first->begin, a.first->end) < std::pair(b.first->begin, b.first->end);
  });
  std::uint64_t at = 0;
  for (const auto& [info, name] : order) {
    if (info->begin < at) fail(*name, "overlaps another tensor");
    if (info->begin > at) fail(*name, "a hole of " + std::to_string(info->begin - at) + " bytes before it");
    at = info->end;
  }
  if (at != data_bytes) {
    fail_request("malformed safetensors file", where,
                 std::to_string(data_bytes - at) + " bytes at the end belong to no tensor");
  }
}

}  // namespace

std::size_t size_of(TensorType type) {
  return row_of(type).size;
}

std::string_view name_of(TensorType type) {
  return row_of(type).name;
}

SafetensorsHeader parse_safetensors(std::span<const std::byte> file, std::string_view where) {
  const auto fail = [&](const std::string& why) { fail_request("malformed safetensors file", where, why); };
  if (file.empty()) fail("the file is empty");
  if (file.size() < length_bytes) fail("shorter than the 8 bytes of the header's length");
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), length_bytes);
  if (length > most_header_bytes) {
    fail("a header of " + std::to_string(length) + " bytes, more than 100 MB; is it a safetensors file?");
  }
  if (length > file.size() - length_bytes) {
    fail("a header of " + std::to_string(length) + " bytes in a file of " + std::to_string(file.size()) +
         "; is it truncated?");
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + length_bytes, length);
  // The JSON reader would take a zero byte for the end of its input.
  if (text.find('\0') != text.npos) fail("a zero byte in the header");
  if (text.empty() || text.front() != '{') fail("the header does not begin with '{'");

  SafetensorsHeader header;
  header.data_offset = length_bytes + length;
  HeaderReader reader(header, where);
  Json::sax_parse(text, &reader);
  check_layout(header, file.size() - header.data_offset, where);
  return header;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : file_(path), header_(parse_safetensors(file_.bytes(), path.string())) {}

const TensorInfo& SafetensorsFile::info(const std::string& name) const {
  const auto found = header_.tensors.find(name);
  if (found != header_.tensors.end()) return found->second;
  std::vector<std::string> names;
  names.reserve(header_.tensors.size());
  for (const auto& entry : header_.tensors) names.push_back(entry.first);
  const std::string near = nearest_name(name, names);
  fail_request("no tensor " + in_quotes(name), path().string(),
               near.empty() ? "the file does not fit" : "the nearest is " + in_quotes(near));
}

std::span<const std::byte> SafetensorsFile::data(const std::string& name) const {
  const TensorInfo& tensor = info(name);
  return file_.bytes().subspan(header_.data_offset + tensor.begin, tensor.end - tensor.begin);
}

void write_safetensors(const std::filesystem::path& path, std::span<const TensorBytes> tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::string header = "{";
  const auto add = [&](const std::string& name, const Json& value) {
    if (header.size() > 1) header += ',';
    header += dump_json(name) + ':' + dump_json(value);
  };
  if (!metadata.empty()) add("__metadata__", metadata);
  std::size_t at = 0;
  std::set<std::string_view> names{"__metadata__"};
  for (const TensorBytes& tensor : tensors) {
    if (!names.insert(tensor.name).second) {
      fail_work("cannot write tensor " + in_quotes(tensor.name), path.string(), "its name is taken");
    }
    if (byte_count(tensor.type, tensor.shape) != tensor.data.size()) {
      fail_work("cannot write tensor " + in_quotes(tensor.name), path.string(),
                "its data do not fit its shape");
    }
    const std::size_t end = at + tensor.data.size();
    add(tensor.name, {{"dtype", name_of(tensor.type)}, {"shape", tensor.shape}, {"data_offsets", {at, end}}});
    at = end;
  }
  header += '}';
  constexpr std::size_t alignment = 64;
  header.append((alignment - (length_bytes + header.size()) % alignment) % alignment, ' ');

  AtomicFile file(path);
  const std::uint64_t length = header.size();
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(header);
  for (const TensorBytes& tensor : tensors) file.write(tensor.data);
  file.commit();
}

}  // namespace megalodon
