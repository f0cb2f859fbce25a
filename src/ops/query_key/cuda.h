#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

struct QueryKeySizes {
  std::int64_t B, L, H, dz;  // dz at most kMostQueryKeyFeatures
  std::int64_t chunk;
  double rope_base, eps;
};
inline constexpr std::int64_t kMostQueryKeyFeatures = 1024;

// z, q, k [B, L, H, dz]; gamma, beta [2, H dz]; start [B].
template <class T>
void query_key_forward(const QueryKeySizes& sizes, const T* z, const float* gamma, const float* beta,
                       const std::int64_t* start, T* q, T* k, cudaStream_t stream);

// sums [blocks, 2, 2, H dz]: the gradients of gamma, then of beta, over the tokens that each of the blocks
// takes.
template <class T>
void query_key_backward(const QueryKeySizes& sizes, const T* z, const float* gamma, const std::int64_t* start,
                        const T* dq, const T* dk, std::int64_t blocks, T* dz, float* sums,
                        cudaStream_t stream);

}  // namespace megalodon::ops::cuda
