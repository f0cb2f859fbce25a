#pragma once
#include <cuda_runtime_api.h>

#include "ops/timestep_norm/kernel.h"

namespace megalodon::ops::cuda {

using cpu::TimestepNormBackward, cpu::TimestepNormForward, cpu::TimestepNormShape;

// Pointers are those of ops/timestep_norm/kernel.h, on a device, but for step_mean, [B, G, L + 1]: a center,
// and how far the mean of each step is from it; and step_rstd, [B, G, L]. last_count [B]: after the last
// step.
template <class T>
void timestep_norm_forward(const TimestepNormShape& shape, const TimestepNormForward<T>& a,
                           std::int64_t* last_count, cudaStream_t stream);

// What else is added to dx [B, L, D]; null or, where a mask is, none.
template <class T>
struct TimestepNormAdded {
  const T *first, *second;
};
// a.d_last_mean and a.d_last_var may be null: none.
// sums [B, units, 2, D]: the gradients of weight and bias over the steps of each unit of the kernel, instead
// of a.d_weight and a.d_bias.
template <class T>
void timestep_norm_backward(const TimestepNormShape& shape, const TimestepNormBackward<T>& a,
                            const TimestepNormAdded<T>& added, float* sums, cudaStream_t stream);
std::int64_t timestep_norm_units(const TimestepNormShape& shape);

}  // namespace megalodon::ops::cuda
