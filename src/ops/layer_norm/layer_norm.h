#pragma once
#include <ATen/core/Tensor.h>
#include <optional>

namespace megalodon::ops {

// (x - mean) / sqrt(var + eps) * (1 + weight) + bias over the last dimension, with the biased variance.
// x [..., D] float32 or bfloat16 (float64 runs the reference); weight, bias [D] float32, both or neither.
// Statistics are float32. Differentiable in x, weight and bias.
at::Tensor layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, double eps = 1e-5);

// The same in plain torch operations. Any device; float32 or float64.
at::Tensor layer_norm_reference(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias, double eps = 1e-5);

}  // namespace megalodon::ops
