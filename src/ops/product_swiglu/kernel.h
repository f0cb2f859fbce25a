#pragma once
#include <cstdint>

namespace megalodon::ops {

// Up to this depth K a block keeps the weight of its columns in shared memory.
inline constexpr std::int64_t kMostResidentDepth = 384;

}  // namespace megalodon::ops
