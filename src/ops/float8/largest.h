#pragma once

namespace megalodon::ops {

// The largest numbers of float8.
inline constexpr float kLargestE4m3 = 448, kLargestE5m2 = 57344;

}  // namespace megalodon::ops
