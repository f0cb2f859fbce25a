#pragma once
#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cpu {

struct CemaShape {
  std::int64_t B, L, D, N;
};

// Complex arrays are pairs of float (real, imaginary).
struct CemaCoefficients {
  const float* p;      // [D, N]
  const float* q;      // [D, N, 2]
  const float* eta;    // [D, N, 2]
  const float* omega;  // [D]
  const float* h0;     // [B, D, N, 2], or null for zero
};

// x, y [B, L, D]; h_last [B, D, N, 2]. T is float or Bfloat16.
template <class T>
void cema_forward(const CemaShape& shape, const CemaCoefficients& c, const T* x, T* y, float* h_last);

struct CemaGradients {
  float *p, *q, *eta, *omega;  // shaped as the coefficients
  float* h0;                   // [B, D, N, 2], or null where there is no h0
};

// dy [B, L, D]; dh_last [B, D, N, 2] or null for zero.
template <class T>
void cema_backward(const CemaShape& shape, const CemaCoefficients& c, const T* x, const T* dy,
                   const float* dh_last, T* dx, const CemaGradients& gradients);

}  // namespace megalodon::ops::cpu
