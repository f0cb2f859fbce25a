#pragma once
#include <cstdint>

namespace megalodon::ops {

// What the kernels take: components of a feature, and of all features of a group.
inline constexpr std::int64_t kMostStepComponents = 64, kMostGroupComponents = 1024;

}  // namespace megalodon::ops
