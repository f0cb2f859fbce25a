#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// Element i of x, in row-major order, is kept with probability 1 - p and scaled by 1/(1 - p). Whether it is
// kept is a function of (key, i) alone (base/random.h), so the backward pass draws it again and any step can
// be replayed. x of any shape, float32, bfloat16 or float64; p in [0, 1). Differentiable in x. p = 0 gives x
// itself.
at::Tensor dropout(const at::Tensor& x, double p, int64_t key);

// The same in plain torch operations, each element's random word drawn alone. Any device.
at::Tensor dropout_reference(const at::Tensor& x, double p, int64_t key);

}  // namespace megalodon::ops
