#pragma once
#include <ATen/core/Tensor.h>
#include <optional>

namespace megalodon::ops {

// silu(a) * b, element by element, with silu(a) = a sigmoid(a): the SwiGLU activation and the output gate of
// attention; without b, silu(a) alone. a, b of one shape and dtype: float32 or bfloat16 (float64 runs the
// reference). Differentiable in a and b; saves only them.
at::Tensor swiglu(const at::Tensor& a, const std::optional<at::Tensor>& b = {});

struct SwigluGradients {
  at::Tensor da, db;  // db is undefined without b
  at::Tensor y;       // swiglu(a, b), bit for bit
};
// Gradients of y = swiglu(a, b) from dy, with y made again in the same pass over memory: for those who do not
// keep it. float32 or bfloat16; not differentiable.
SwigluGradients swiglu_gradients(const at::Tensor& a, const std::optional<at::Tensor>& b,
                                 const at::Tensor& dy);

// swiglu in plain torch operations. Any device; float32 or float64.
at::Tensor swiglu_reference(const at::Tensor& a, const std::optional<at::Tensor>& b = {});

}  // namespace megalodon::ops
