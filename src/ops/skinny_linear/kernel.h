#pragma once
#include <cstdint>

namespace megalodon::ops {

enum class InputNorm : std::int64_t { none, rms, layer };

// What the kernels take: rows, those of them that they normalise, and layers of a call.
inline constexpr std::int64_t kMostSkinnyRows = 32, kMostSkinnyNormRows = 8, kMostSkinnyLayers = 8;

}  // namespace megalodon::ops
