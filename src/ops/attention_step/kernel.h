#pragma once
#include <cstdint>

namespace megalodon::ops {

// Most features of a key that the kernels take; keys and values are whole packs of 16 bytes.
inline constexpr std::int64_t kMostStepFeatures = 1024;

}  // namespace megalodon::ops
