#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "ops/skinny_linear/kernel.h"

namespace megalodon::ops {

// A linear layer with what stands before and after it:
//   y = f(n(x) weight^T + bias) + add,   f(a) = a, or silu(a), or silu(a) (n(x) up^T),
// n the norm of ops/rms_norm/rms_norm.h or ops/layer_norm/layer_norm.h, if any.
struct SkinnyLayer {
  at::Tensor x;  // [..., in] float32 or bfloat16 (float64 too)
  InputNorm norm = InputNorm::none;
  at::Tensor norm_weight = {}, norm_bias = {};  // [in] float32, or undefined
  at::Tensor weight = {};                       // [out, in]
  at::Tensor bias = {};                         // [out], or undefined
  bool silu = false;
  at::Tensor up = {};   // [out, in], where silu; or undefined
  at::Tensor add = {};  // [..., out] in the dtype of x, or undefined
};

// Results [..., out] of some layers, x of one shape in all, in the dtype of x. On a GPU in bfloat16 without
// gradients: up to kMostKernelRows rows one kernel, bound by the reading of the weights; up to
// kMostSkinnyRows the norms, then on Hopper one kernel, elsewhere products by a library, one for weights that
// lie together, and one kernel for what stands behind them. The operators one by one otherwise. The project's
// kernels read weights and biases while the kernel before them ends, and must not find there what that one
// writes.
std::vector<at::Tensor> skinny_linear(const std::vector<SkinnyLayer>& layers, double eps = 1e-5);

// Whether there are kernels for such an x where no gradient is wanted.
bool has_skinny_kernel(const at::Tensor& x);

// n(x) of each layer; neighbours whose input is the same share it.
std::vector<at::Tensor> normalised_inputs(const std::vector<SkinnyLayer>& layers, double eps);

// The same operator by operator. Any device; float32, bfloat16 or float64.
std::vector<at::Tensor> skinny_linear_reference(const std::vector<SkinnyLayer>& layers, double eps = 1e-5);

}  // namespace megalodon::ops
