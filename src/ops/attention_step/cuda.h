#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// As ops/attention_step/attention_step.h. The rings get the new key and value.
template <class T>
struct AttentionStep {
  std::int64_t B, H, dz, dv, C, chunk;
  double log2_base;
  float eps;
  const T *z, *v, *gate;      // [B, H, dz], [B, H, dv], [B, H, dv]
  const float *gamma, *beta;  // [2, H dz]
  const std::int64_t* start;  // [B]
  T *ring_k, *ring_v;         // [B, C, H, dz], [B, C, H, dv]
  T* o;                       // [B, H, dv]
};
template <class T>
void attention_step(const AttentionStep<T>& a, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
