#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// As ops/rms_norm/kernel.h, on a device, K times: x, y, dy, dx [K, rows, D], weight [K, D] or null.
template <class T>
void rms_norm_forward(const T* x, const float* weight, float eps, std::int64_t K, std::int64_t rows,
                      std::int64_t D, T* y, float* rstd, cudaStream_t stream);
// d_weight [blocks, K, D]: the sums over the rows that each of the `blocks` blocks takes; null where weight
// is.
template <class T>
void rms_norm_backward(const T* x, const float* weight, const float* rstd, const T* dy, std::int64_t K,
                       std::int64_t rows, std::int64_t D, std::int64_t blocks, T* dx, float* d_weight,
                       cudaStream_t stream);

}  // namespace megalodon::ops::cuda
