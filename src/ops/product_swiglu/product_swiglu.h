#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "ops/swiglu/swiglu.h"

// Products of matrices with SwiGLU where their results are at hand: on a Hopper GPU in bfloat16, with sizes
// but M in multiples of 64, in the product's kernel; elsewhere one operator after the other. None is
// differentiable.
namespace megalodon::ops {

struct SwigluProduct {
  at::Tensor a, b;  // [M, F], columns of one tensor [M, 2 F]; undefined where they are not wanted
  at::Tensor y;     // swiglu(a, b)
};
// a = x W_a^T and b = x W_b^T for x [M, K] and a weight [2 F, K] that is W_a and, below it, W_b.
SwigluProduct product_swiglu(const at::Tensor& x, const at::Tensor& weight, bool factors = true);

// x W^T for x [M, K] and weight W [N, K] in one type: of many short rows by the same kernel, whose weights
// stay in shared memory; else product().
at::Tensor tall_product(const at::Tensor& x, const at::Tensor& weight);

// swiglu_gradients(a, b, dy W) for dy [M, D], weight W [D, F] and a, b [M, F], or for stacks of them,
// [S, M, D] and so on. In the kernel dy W is neither rounded nor kept.
SwigluGradients product_swiglu_gradients(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& a,
                                         const std::optional<at::Tensor>& b, bool biased = false,
                                         bool value = true);

// Both in plain torch operations. Any device; float32 or float64.
SwigluProduct product_swiglu_reference(const at::Tensor& x, const at::Tensor& weight);
SwigluGradients product_swiglu_gradients_reference(const at::Tensor& dy, const at::Tensor& weight,
                                                   const at::Tensor& a, const std::optional<at::Tensor>& b,
                                                   bool biased = false);

}  // namespace megalodon::ops
