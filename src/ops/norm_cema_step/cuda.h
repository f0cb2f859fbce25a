#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"
#include "ops/norm_cema_step/kernel.h"

namespace megalodon::ops::cuda {

// As ops/norm_cema_step/norm_cema_step.h; complex numbers are pairs of floats. mean, var and h are
// replaced. N is a multiple of 4, and a group has at least two features.
template <class T>
struct NormCemaStep {
  std::int64_t B, D, G, N;
  const T* x;                                        // [B, D]
  const float *weight, *bias, *p, *q, *eta, *omega;  // [D] or [D, N]
  const std::int64_t* count;                         // [B]
  float *mean, *var;                                 // [B, G]
  float* h;                                          // [B, D, N, 2]
  float eps;
  T *normal, *y;             // [B, D]
  std::int64_t* next_count;  // [B]
};
template <class T>
void norm_cema_step(const NormCemaStep<T>& a, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
