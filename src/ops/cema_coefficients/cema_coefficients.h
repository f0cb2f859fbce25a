#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

struct CemaCoefficients {
  at::Tensor p;       // [D, N]
  at::Tensor q, eta;  // [D, N] complex
};

// The coefficients of ops::cema from its parameters (arXiv 2404.08801, section 3.1), n = 1 .. N:
//   p = sigmoid(alpha),   q = (1 - p sigmoid(delta)) exp(i n 2 pi / N sigmoid(theta)),   eta = gamma /
//   sqrt(N).
// alpha, delta [D, N], theta [D], gamma [D, N, 2] (real and imaginary parts); all float32, or all float64 for
// the reference. Differentiable in all of them.
CemaCoefficients cema_coefficients(const at::Tensor& alpha, const at::Tensor& delta, const at::Tensor& theta,
                                   const at::Tensor& gamma);

// The same in plain torch operations, some forty with the backward pass. Any device; float32 or float64.
CemaCoefficients cema_coefficients_reference(const at::Tensor& alpha, const at::Tensor& delta,
                                             const at::Tensor& theta, const at::Tensor& gamma);

}  // namespace megalodon::ops
