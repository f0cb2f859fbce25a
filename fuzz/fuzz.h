#pragma once
// Shared by the fuzz targets: an input is either taken, or refused with an Error; anything else ends the run.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "base/error.h"

namespace megalodon::fuzz {

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "fuzz: broken: %s\n", what);
  std::abort();
}

// Runs `action`; true if it took the input. A refusal must be one line of a length that a person reads.
template <class F>
bool takes(F&& action) {
  try {
    action();
    return true;
  } catch (const Error& error) {
    const std::string_view message = error.what();
    require(!message.empty() && message.size() < 600, "the length of an error message");
    const auto controls = [](unsigned char c) { return c < 0x20 || c == 0x7f; };
    require(std::none_of(message.begin(), message.end(), controls), "no control character in a message");
    return false;
  }
}

inline std::string_view text_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

}  // namespace megalodon::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
