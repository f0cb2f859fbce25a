#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// Rows of D elements, D at most 8192 where it is a multiple of 4 and all pointers of 4 elements, else 2048.
// `added` and `sum` are null together: then x is the sum.
template <class T>
void add_rms_norm_forward(const float* x, const T* added, const float* factor, float eps, std::int64_t rows,
                          std::int64_t D, float* sum, T* normal, float* rstd, cudaStream_t stream);
// d_sum may be null. dx, and the same as d_added unless that is null. d_factor [blocks, D]: the sums over the
// rows that each of the `blocks` blocks takes.
template <class T>
void add_rms_norm_backward(const float* sum, const float* factor, const float* rstd, const float* d_sum,
                           const T* d_normal, std::int64_t rows, std::int64_t D, std::int64_t blocks,
                           float* dx, T* d_added, float* d_factor, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
