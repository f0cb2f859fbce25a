#pragma once
#include <ATen/core/Tensor.h>
#include <optional>

namespace megalodon::ops {

struct CemaResult {
  at::Tensor y;       // [B, L, D], dtype of x
  at::Tensor h_last;  // [B, D, N] complex64: the state after the last step
};

// Complex exponential moving average (arXiv 2404.08801, section 3.1): for each feature d and component n
//   h_t = q h_{t-1} + p x_t,    y_t = Re(sum_n eta_n h_{t,n}) + omega x_t.
// x [B, L, D] float32 or bfloat16 (float64 runs the reference); p [D, N] float32; q, eta [D, N] complex64;
// omega [D] float32; h0 [B, D, N] complex64 or none (zero). L >= 1. The state is float32 whatever x is.
// Differentiable in every tensor argument and from both results. Saves only its inputs for the backward pass.
// Errors: c10::Error naming operator and argument, for shapes, types (float16 included) or devices that do
// not fit.
CemaResult cema(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q, const at::Tensor& eta,
                const at::Tensor& omega, const std::optional<at::Tensor>& h0 = {});

// The same step by step in torch operations: the definition that tests trust. Any device; float32 or float64
// (with complex64 or complex128 coefficients and state).
CemaResult cema_reference(const at::Tensor& x, const at::Tensor& p, const at::Tensor& q,
                          const at::Tensor& eta, const at::Tensor& omega,
                          const std::optional<at::Tensor>& h0 = {});

}  // namespace megalodon::ops
