#include <cstring>
#include <string>

#include "base/safetensors.h"
#include "fuzz.h"

namespace megalodon::fuzz {
namespace {

// What a header that was taken promises to its readers.
void check(const SafetensorsHeader& header, std::size_t file_bytes) {
  require(header.data_offset <= file_bytes, "the data begin in the file");
  std::size_t total = 0;
  for (const auto& [name, info] : header.tensors) {
    require(info.begin <= info.end && info.end <= file_bytes - header.data_offset,
            "a tensor lies in the data");
    unsigned __int128 bytes = size_of(info.type);
    bool empty = false;
    for (const std::int64_t dimension : info.shape) {
      require(dimension >= 0, "a dimension is not negative");
      empty |= dimension == 0;
      if (dimension > 0) bytes *= static_cast<unsigned __int128>(dimension);
      require(bytes <= INT64_MAX, "a shape does not overflow");
    }
    require((empty ? 0 : bytes) == info.end - info.begin, "a tensor is as long as its shape says");
    total += info.end - info.begin;
  }
  require(total == file_bytes - header.data_offset, "the tensors are the data");
}

void parse(std::string_view file) {
  takes([&] { check(parse_safetensors(std::as_bytes(std::span(file)), "input"), file.size()); });
}

}  // namespace
}  // namespace megalodon::fuzz

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace megalodon::fuzz;
  std::string file(text_of(data, size));
  parse(file);
  // Most mutations break the header's length. Mend it, so that they reach what comes after.
  const std::size_t brace = file.rfind('}');
  if (brace != file.npos && brace >= 8) {
    const std::uint64_t length = brace + 1 - 8;
    std::memcpy(file.data(), &length, 8);
    parse(file);
  }
  return 0;
}
