#pragma once
#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cpu {

// x, y, dy, dx [rows, D] of T (float or Bfloat16); weight [D], or null for no scale; rstd [rows].
template <class T>
void rms_norm_forward(const T* x, const float* weight, float eps, std::int64_t rows, std::int64_t D, T* y,
                      float* rstd);
// d_weight [row_block_count(rows), D]: the sums over each block; null where weight is.
template <class T>
void rms_norm_backward(const T* x, const float* weight, const float* rstd, const T* dy, std::int64_t rows,
                       std::int64_t D, T* dx, double* d_weight);

}  // namespace megalodon::ops::cpu
