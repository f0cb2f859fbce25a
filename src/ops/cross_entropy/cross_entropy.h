#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// A target that does not count.
inline constexpr int64_t kIgnoredTarget = -100;

// Negative log-likelihood of each target: nll[t] = logsumexp(logits[t]) - logits[t, targets[t]], and 0 where
// targets[t] = -100. logits [T, V] float32 or bfloat16 (float64 runs the reference); targets [T] int64 in
// 0..V-1 or -100. Returns [T] float32. Differentiable in logits; keeps them and nll.
// Other targets are an error that names the first of them and its place. The last `padding` columns of logits
// are no classes: V does not count them, and their gradients are 0.
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& targets, int64_t padding = 0);

// Refuses targets that are not [T] int64 in 0..V-1 or -100, in the name of operator `op`. Values are looked
// at on the CPU alone: elsewhere that would wait for the device.
void check_targets(const char* op, const at::Tensor& targets, int64_t T, int64_t V);

// The same in plain torch operations. Any device; float32 or float64.
at::Tensor cross_entropy_reference(const at::Tensor& logits, const at::Tensor& targets);

}  // namespace megalodon::ops
