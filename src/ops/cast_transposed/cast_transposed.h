#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// x [M, N] float32 in bfloat16 with its columns contiguous in memory: as x.t().to(bfloat16).contiguous().t().
// Not differentiable.
at::Tensor cast_transposed(const at::Tensor& x);

// The same in plain torch operations.
at::Tensor cast_transposed_reference(const at::Tensor& x);

}  // namespace megalodon::ops
