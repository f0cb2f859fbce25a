#pragma once
#include <cstdint>

#include "ops/cema/cuda.h"
#include "ops/cuda_tensor_map.h"

// Boxes of kBoxSteps steps x kCemaTileFeatures features of an array [B, L, D] that the tensor memory
// accelerator copies to shared memory and back. It keeps many more rows of 32 bytes on their way than loads
// and stores do. What lies outside the array is zero.
namespace megalodon::ops::cuda {

using Boxes = CUtensorMap;
inline constexpr int kBoxSteps = 256;

// In shared memory, at multiples of 256 bytes, the 16-byte halves of steps 4 .. 7 of 8 change places.
inline Boxes make_boxes(const CemaShape& s, const Bfloat16* x) {
  return tensor_map("cema", x,
                    {.sizes = {s.D, s.L, s.B},
                     .strides = {s.D, s.L * s.D},
                     .box = {static_cast<int>(kCemaTileFeatures), kBoxSteps, 1},
                     .swizzle = CU_TENSOR_MAP_SWIZZLE_32B,
                     .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B});
}

}  // namespace megalodon::ops::cuda
