#pragma once
#include <cstdint>

namespace megalodon::ops::cuda {

// base^(-2 pair/d), from the logarithm of the base to base 2.
__device__ inline double rope_frequency(double log2_base, std::int64_t pair, std::int64_t d) {
  return exp2(-2.0 * static_cast<double>(pair) / static_cast<double>(d) * log2_base);
}

// Cosine and sine of position * frequency: whole turns go in float64, what is left is a float.
__device__ inline float2 rotation(std::int64_t position, double frequency) {
  constexpr double kTurn = 6.283185307179586477;
  const double turns = static_cast<double>(position) * frequency * (1 / kTurn);
  float2 r;
  sincospif(2 * static_cast<float>(turns - rint(turns)), &r.y, &r.x);
  return r;
}

__device__ inline float2 rotate(float2 pair, float2 r) {
  return {pair.x * r.x - pair.y * r.y, pair.x * r.y + pair.y * r.x};
}
__device__ inline float2 rotate_back(float2 pair, float2 r) {
  return rotate(pair, {r.x, -r.y});
}

}  // namespace megalodon::ops::cuda
