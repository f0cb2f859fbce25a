#pragma once
#include <ATen/core/Tensor.h>
#include <optional>

namespace megalodon::ops {

// silu(a) * b, element by element, with silu(a) = a sigmoid(a): the SwiGLU activation and the output gate of
// attention; without b, silu(a) alone. a, b of one shape and dtype: float32 or bfloat16 (float64 runs the
// reference). Differentiable in a and b; saves only them.
at::Tensor swiglu(const at::Tensor& a, const std::optional<at::Tensor>& b = {});

// The same in plain torch operations. Any device; float32 or float64.
at::Tensor swiglu_reference(const at::Tensor& a, const std::optional<at::Tensor>& b = {});

}  // namespace megalodon::ops
