#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "ops/timestep_norm/kernel.h"

namespace megalodon::ops::cuda {

using cpu::TimestepNormBackward, cpu::TimestepNormForward, cpu::TimestepNormShape;

inline constexpr std::int64_t kTimestepNormTile = 32;  // steps that a block takes at once

// Bytes of scratch memory that either pass wants, at a multiple of 16.
std::size_t timestep_norm_work(const TimestepNormShape& shape);

// Pointers are those of ops/timestep_norm/kernel.h, on a device, but for step_mean, [B, L + 1, G]: a center,
// and how far the mean of each step is from it.
template <class T>
void timestep_norm_forward(const TimestepNormShape& shape, const TimestepNormForward<T>& a, void* work,
                           cudaStream_t stream);
// What else is added to dx [B, L, D]; null or, where a mask is, none.
template <class T>
struct TimestepNormAdded {
  const T *first, *second;
};
// sums [B, tiles, 2, D]: the gradients of weight and bias of each tile, instead of a.d_weight and a.d_bias.
template <class T>
void timestep_norm_backward(const TimestepNormShape& shape, const TimestepNormBackward<T>& a,
                            const TimestepNormAdded<T>& added, void* work, float* sums, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
