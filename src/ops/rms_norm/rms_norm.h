#pragma once
#include <ATen/core/Tensor.h>
#include <optional>

namespace megalodon::ops {

// x / sqrt(mean(x^2) + eps) * (1 + weight) over the last dimension.
// x [..., D] float32 or bfloat16 (float64 runs the reference); weight [D] float32 or none (no scale), or
// [K, D] with each weight for its K-th of the rows.
// Statistics are float32. Differentiable in x and weight.
at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps = 1e-5);

// The same in plain torch operations. Any device; float32 or float64.
at::Tensor rms_norm_reference(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                              double eps = 1e-5);

}  // namespace megalodon::ops
