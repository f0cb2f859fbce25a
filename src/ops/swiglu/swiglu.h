#pragma once
#include <ATen/core/Tensor.h>
#include <optional>

namespace megalodon::ops {

// silu(a) * b, element by element, with silu(a) = a sigmoid(a): the SwiGLU activation and the output gate of
// attention; without b, silu(a) alone. a, b of one shape [..., F] and dtype: float32 or bfloat16 (float64
// runs the reference). Differentiable in a and b; saves only them. `bias` [F] float32 (float64 beside it) is
// one that whoever made a has added to its rows. It changes nothing here and has its gradient here, in the
// pass over memory that makes that of a.
at::Tensor swiglu(const at::Tensor& a, const std::optional<at::Tensor>& b = {},
                  const std::optional<at::Tensor>& bias = {});

struct SwigluGradients {
  at::Tensor da, db;  // db is undefined without b
  at::Tensor y;       // swiglu(a, b), bit for bit
  at::Tensor d_bias;  // [F] float32, the sum of da over the rows; undefined unless `biased`
};
// Gradients of y = swiglu(a, b) from dy, with y made again in the same pass over memory: for those who do not
// keep it; without y unless `value`. float32 or bfloat16; not differentiable.
SwigluGradients swiglu_gradients(const at::Tensor& a, const std::optional<at::Tensor>& b,
                                 const at::Tensor& dy, bool biased = false, bool value = true);

// swiglu in plain torch operations. Any device; float32 or float64.
at::Tensor swiglu_reference(const at::Tensor& a, const std::optional<at::Tensor>& b = {},
                            const std::optional<at::Tensor>& bias = {});

}  // namespace megalodon::ops
