#pragma once
#include <cstdint>

namespace megalodon::ops {

// The bits of a bfloat16, as kernels see them (they include no torch header).
struct Bfloat16 {
  std::uint16_t bits;
};

}  // namespace megalodon::ops
