#pragma once
#include <ATen/core/Tensor.h>
#include <optional>
#include <tuple>

namespace megalodon::ops {

// Cumulative statistics of each stream and group. Fresh: count 0, mean 0, variance 1.
struct TimestepNormState {
  at::Tensor count;  // [B] int64
  at::Tensor mean;   // [B, G] float32
  at::Tensor var;    // [B, G] float32, biased
};

struct TimestepNormResult {
  at::Tensor y;  // [B, L, D], dtype of x
  TimestepNormState state;
};

// Timestep normalization (arXiv 2404.08801, section 3.2): group normalization with statistics cumulative over
// time. With m_t, s_t the mean and variance of the D/G features of a group at step t, and n the count before
// it:
//   mean += (m_t - mean)/(n+1),   var = (n var + s_t)/(n+1) + n/(n+1)^2 (m_t - mean_before)^2,
//   y_t = (x_t - mean)/sqrt(var + eps) (1 + weight) + bias.
// x [B, L, D] float32 or bfloat16 (float64 runs the reference); weight, bias [D] float32; G =
// state.mean.size(1) divides D. padding_mask [B, L] bool or uint8 or none, not 0 = padded: y is exactly 0
// there, the statistics stay, gradients are 0. A prior is a state that does not start fresh. With G = D a
// single step has no variance: count > 1 is required there. L >= 1. Differentiable in x, weight, bias,
// state.mean, state.var and from y, mean, var.
TimestepNormResult timestep_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                 const TimestepNormState& state,
                                 const std::optional<at::Tensor>& padding_mask = {}, double eps = 1e-5);

// The same without a mask, and x itself twice, for residuals: the gradients of those are added to x's in the
// kernel that makes it.
std::tuple<TimestepNormResult, at::Tensor, at::Tensor> timestep_norm_and_pass(const at::Tensor& x,
                                                                              const at::Tensor& weight,
                                                                              const at::Tensor& bias,
                                                                              const TimestepNormState& state,
                                                                              double eps = 1e-5);

// The same in plain torch operations: moments, scan, normalisation. Any device; float32 or float64.
TimestepNormResult timestep_norm_reference(const at::Tensor& x, const at::Tensor& weight,
                                           const at::Tensor& bias, const TimestepNormState& state,
                                           const std::optional<at::Tensor>& padding_mask = {},
                                           double eps = 1e-5);

}  // namespace megalodon::ops
