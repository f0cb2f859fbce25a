#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"

namespace megalodon {

// Element types by their safetensors names.
enum class TensorType { bool_, u8, i8, i16, i32, i64, f16, bf16, f32, f64 };
std::size_t size_of(TensorType type);
std::string_view name_of(TensorType type);  // "F32"

struct TensorInfo {
  TensorType type;
  std::vector<std::int64_t> shape;
  std::size_t begin, end;  // bytes, from the start of the data
};

struct SafetensorsHeader {
  std::map<std::string, TensorInfo> tensors;
  std::map<std::string, std::string> metadata;
  std::size_t data_offset;  // where the data starts in the file
};

// Parses and checks the header of a safetensors file that is `file` bytes whole. Refused, each with its
// reason: a header beyond 100 MB or the file, JSON that is not an object, duplicate keys, unknown types,
// negative or overflowing shapes, offsets out of order, outside the data or at odds with the shape, overlaps,
// holes, more than 64 dimensions or 100,000 entries. Allocates in proportion to the header's length alone.
// Errors are request errors naming `where`.
SafetensorsHeader parse_safetensors(std::span<const std::byte> file, std::string_view where);

// A safetensors file, mapped. The data of a tensor need not be aligned.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  const SafetensorsHeader& header() const { return header_; }
  const std::filesystem::path& path() const { return file_.path(); }
  bool has(const std::string& name) const { return header_.tensors.contains(name); }
  const TensorInfo& info(const std::string& name) const;  // request error where it is missing
  std::span<const std::byte> data(const std::string& name) const;

 private:
  MappedFile file_;
  SafetensorsHeader header_;
};

struct TensorBytes {
  std::string name;
  TensorType type;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
};

// Writes atomically, tensors in the order given without gaps; the first begins at a multiple of 64 bytes.
void write_safetensors(const std::filesystem::path& path, std::span<const TensorBytes> tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace megalodon
