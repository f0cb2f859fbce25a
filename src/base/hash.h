#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace megalodon {

std::uint64_t xxh3(std::span<const std::byte> bytes);
inline std::uint64_t xxh3(std::string_view text) {
  return xxh3(std::as_bytes(std::span(text.data(), text.size())));
}
std::uint64_t xxh3_of_file(const std::filesystem::path& path);
std::string hex(std::uint64_t value);  // 16 digits

// CRC-32C (Castagnoli), as TensorBoard's record format uses it.
std::uint32_t crc32c(std::span<const std::byte> bytes);

}  // namespace megalodon
