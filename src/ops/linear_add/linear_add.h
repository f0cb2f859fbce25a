#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// added + x weight^T, rounded once: x [R, in], weight [out, in], added [R, out], or stacks of them, [K, ...],
// all of one type. On a GPU in bfloat16 the product reads `added` where it writes the result. Not
// differentiable.
at::Tensor linear_add(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& added);

// The same by torch's product, which adds to a copy.
at::Tensor linear_add_reference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& added);

}  // namespace megalodon::ops
