#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// The mean of ops::cross_entropy over the targets that count, of logits hidden weight^T; 0 where none counts.
// hidden [N, D] float32 or bfloat16 (float64 runs the reference); weight [V, D] float32, cast to the type of
// hidden; targets [N] int64 in 0..V-1 or -100. Returns a float32 number; with the weights [K, V, D] of
// stacked models, each for its K-th of the rows, the mean of each: [K].
// At most `logits_at_once` logits (or those of one row) are in memory. Differentiable in hidden and weight:
// where gradients may be asked for they are computed along with the loss and kept, no logits; that of weight
// is summed over the blocks in float32.
at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                int64_t logits_at_once = int64_t{1} << 26);

// The same in plain torch operations, all logits at once. Any device; float32 or float64.
at::Tensor linear_cross_entropy_reference(const at::Tensor& hidden, const at::Tensor& weight,
                                          const at::Tensor& targets);

}  // namespace megalodon::ops
