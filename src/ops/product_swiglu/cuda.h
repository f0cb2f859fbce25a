#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"
#include "ops/product_swiglu/kernel.h"

namespace megalodon::ops::cuda {

// Whether the current device has the kernels. They take K and F in multiples of 64, and matrices whose rows
// begin at multiples of 16 bytes.
bool has_product_swiglu();

struct ProductSwiglu {
  std::int64_t M, K, F;
  const Bfloat16 *x, *weight;  // [M, K], [2 F, K]
  Bfloat16* both;              // [M, 2 F]
  Bfloat16* y;                 // [M, F]; either null where it is not wanted
};
void product_swiglu(const ProductSwiglu& p, cudaStream_t stream);

struct ProductSwigluGradients {
  std::int64_t M, K, F;
  const Bfloat16 *dy, *weight;  // [M, K], [K, F]
  const Bfloat16 *a, *b;        // [M, F]; b null: silu(a) alone
  std::int64_t a_step, b_step;  // from row to row, in numbers
  Bfloat16 *da, *db;            // [M, F], rows `d_step` numbers apart; db null without b
  std::int64_t d_step;
  Bfloat16* y;  // [M, F]; null where it is not wanted
  float* sums;  // of rows of da, [product_swiglu_sums(M, K), F]; null where they are not wanted
};
std::int64_t product_swiglu_sums(std::int64_t M, std::int64_t K);
void product_swiglu_gradients(const ProductSwigluGradients& p, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
