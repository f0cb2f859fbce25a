#pragma once
#include <cstdint>

namespace megalodon::ops {

// An element is kept where its random word is not below this: p in [0, 1) of all 32-bit words are.
inline std::uint32_t dropout_threshold(double p) {
  return static_cast<std::uint32_t>(p * 0x1p32);
}

}  // namespace megalodon::ops
