#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// Whether the current device has the kernels. They take rows of D = kNormProductWidth, K in multiples of 64,
// and matrices that begin at multiples of 16 bytes.
bool has_product_rms_norm();
inline constexpr std::int64_t kNormProductWidth = 384;

struct ProductRmsNorm {
  std::int64_t M, K;
  const Bfloat16 *x, *weight;      // [M, K], [D, K]
  const float *residual, *factor;  // [M, D], [D]
  float eps;
  float* sum;        // [M, D]
  Bfloat16* normal;  // [M, D]
  float* rstd;       // [M]
};
void product_rms_norm(const ProductRmsNorm& p, cudaStream_t stream);

struct ProductRmsNormGradients {
  std::int64_t M, K;
  const Bfloat16 *dy, *weight;       // [M, K], [K, D]
  const float *sum, *factor, *rstd;  // [M, D], [D], [M]
  const float* d_sum;                // [M, D] or null
  float* dx;                         // [M, D]
  Bfloat16* d_added;                 // the same, or null
  float* d_factor;                   // sums of rows, [product_rms_norm_sums(M), D]
};
std::int64_t product_rms_norm_sums(std::int64_t M);
void product_rms_norm_gradients(const ProductRmsNormGradients& p, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
