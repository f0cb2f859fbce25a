#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// The largest absolute value of n numbers, as the bits of a float; of numbers that are none a NaN's.
// `largest` must hold 0.
void largest_magnitude(const Bfloat16* x, std::int64_t n, std::uint32_t* largest, cudaStream_t stream);

// x [R, C] in float8, e4m3 or e5m2, as bytes: rows [R, C] and columns [C, R], each null where it is not
// wanted. R and C are multiples of 16, all pointers of 16 bytes.
void cast_to_float8(const Bfloat16* x, std::int64_t R, std::int64_t C, bool e4m3,
                    const std::uint32_t* largest, std::uint8_t* rows, std::uint8_t* columns, float* scale,
                    cudaStream_t stream);

}  // namespace megalodon::ops::cuda
