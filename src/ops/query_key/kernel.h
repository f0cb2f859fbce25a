#pragma once
#include <cstdint>

#include "ops/bfloat16.h"
#include "ops/rope/kernel.h"

namespace megalodon::ops::cpu {

struct QueryKeySizes {
  std::int64_t B, L, H, dz;
  double eps;
};

// z, q, k [B, L, H, dz]; gamma, beta [2, H dz].
template <class T>
void query_key_forward(const QueryKeySizes& sizes, const T* z, const float* gamma, const float* beta,
                       const Rotations& rotations, T* q, T* k);

// sums [row_block_count(B L), 2, 2, H dz]: the gradients of gamma, then of beta, for each block of rows.
template <class T>
void query_key_backward(const QueryKeySizes& sizes, const T* z, const float* gamma,
                        const Rotations& rotations, const T* dq, const T* dk, T* dz, double* sums);

}  // namespace megalodon::ops::cpu
