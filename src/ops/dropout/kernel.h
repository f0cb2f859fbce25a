#pragma once
#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops {

// An element is kept where its random word is not below this: p in [0, 1) of all 32-bit words are.
inline std::uint32_t dropout_threshold(double p) {
  return static_cast<std::uint32_t>(p * 0x1p32);
}

namespace cpu {

// y[i] = x[i] scale where word i % 4 of philox(key, i / 4, 0) is at least `threshold`, else 0.
template <class T>
void dropout(const T* x, std::uint64_t key, std::uint32_t threshold, float scale, std::int64_t n, T* y);

}  // namespace cpu
}  // namespace megalodon::ops
