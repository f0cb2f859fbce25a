#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// As ops/layer_norm/kernel.h, on a device.
template <class T>
void layer_norm_forward(const T* x, const float* weight, const float* bias, float eps, std::int64_t rows,
                        std::int64_t D, T* y, float* mean, float* rstd, cudaStream_t stream);
// sums [blocks, 2, D]: the gradients of weight and bias over the rows that each of the `blocks` blocks takes;
// null where weight is.
template <class T>
void layer_norm_backward(const T* x, const float* weight, const float* mean, const float* rstd, const T* dy,
                         std::int64_t rows, std::int64_t D, std::int64_t blocks, T* dx, float* sums,
                         cudaStream_t stream);

}  // namespace megalodon::ops::cuda
