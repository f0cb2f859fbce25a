#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// The sum of the rows of x [R, D] in float32 ([D]; of float64 in float64), in an order that depends on the
// shape alone: gradients of biases. Not differentiable.
at::Tensor column_sum(const at::Tensor& x);

// The same in plain torch operations.
at::Tensor column_sum_reference(const at::Tensor& x);

}  // namespace megalodon::ops
