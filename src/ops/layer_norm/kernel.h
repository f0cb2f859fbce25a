#pragma once
#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cpu {

// x, y, dy, dx [rows, D] of T (float or Bfloat16); weight, bias [D], or both null; mean, rstd [rows].
template <class T>
void layer_norm_forward(const T* x, const float* weight, const float* bias, float eps, std::int64_t rows,
                        std::int64_t D, T* y, float* mean, float* rstd);
// d_weight, d_bias [row_block_count(rows), D]: the sums over each block; null where weight is.
template <class T>
void layer_norm_backward(const T* x, const float* weight, const float* mean, const float* rstd, const T* dy,
                         std::int64_t rows, std::int64_t D, T* dx, double* d_weight, double* d_bias);

}  // namespace megalodon::ops::cpu
