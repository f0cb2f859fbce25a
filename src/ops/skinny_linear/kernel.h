#pragma once
#include <cstdint>

namespace megalodon::ops {

enum class InputNorm : std::int64_t { none, rms, layer };

// Rows of a call, those that one kernel takes, and layers.
inline constexpr std::int64_t kMostSkinnyRows = 32, kMostKernelRows = 4, kMostSkinnyLayers = 8;

}  // namespace megalodon::ops
