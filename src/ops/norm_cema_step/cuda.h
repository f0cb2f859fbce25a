#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"
#include "ops/norm_cema_step/kernel.h"

namespace megalodon::ops::cuda {

// As ops/norm_cema_step/norm_cema_step.h; complex numbers are pairs of floats. h is replaced; mean and var
// may be. N is a multiple of 4, a group has at least two features. With N = 0 the norm alone: what is of the
// moving average may be null.
template <class T>
struct NormCemaStep {
  std::int64_t B, D, G, N;
  const T* x;                                        // [B, D]
  const float *weight, *bias, *p, *q, *eta, *omega;  // [D] or [D, N]
  const std::int64_t* count;                         // [B]
  const float *mean, *var;                           // [B, G]
  float* h;                                          // [B, D, N, 2]
  float eps;
  T *normal, *y;                // [B, D]
  std::int64_t* next_count;     // [B]
  float *next_mean, *next_var;  // [B, G]
  bool early;                   // as NormCemaParameters::early
};
inline constexpr std::int64_t kMostNormStepFeatures = 512;  // of a group, where N = 0
template <class T>
void norm_cema_step(const NormCemaStep<T>& a, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
