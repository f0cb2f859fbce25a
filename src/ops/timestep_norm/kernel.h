#pragma once
#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cpu {

// Pointers to contiguous tensors; T is float or Bfloat16.
struct TimestepNormShape {
  std::int64_t B, L, D, G;
};

template <class T>
struct TimestepNormForward {
  const T* x;                  // [B, L, D]
  const float *weight, *bias;  // [D]
  const std::int64_t* count;   // [B], before the first step
  const float *mean, *var;     // [B, G], before the first step
  const std::uint8_t* mask;    // [B, L], not 0 = padded; or null
  float eps;
  T* y;                          // [B, L, D]
  float *last_mean, *last_var;   // [B, G]
  float *step_mean, *step_rstd;  // [B, L, G] of each step, for the backward pass; or null
};

template <class T>
struct TimestepNormBackward {
  const T *x, *dy;                        // [B, L, D]
  const float* weight;                    // [D]
  const std::int64_t* last_count;         // [B], after the last step
  const std::uint8_t* mask;               // [B, L] or null
  const float *step_mean, *step_rstd;     // [B, L, G]
  const float *d_last_mean, *d_last_var;  // [B, G]
  T* dx;                                  // [B, L, D]
  double *d_weight, *d_bias;              // [B, D]: the sums over each sequence
  float *d_mean, *d_var;                  // [B, G]
};

template <class T>
void timestep_norm_forward(const TimestepNormShape& shape, const TimestepNormForward<T>& a);
template <class T>
void timestep_norm_backward(const TimestepNormShape& shape, const TimestepNormBackward<T>& a);

}  // namespace megalodon::ops::cpu
