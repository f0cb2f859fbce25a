#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// Writes keys or values [B, L, H, d] of positions start[b] .. start[b] + L - 1 into the ring `cache` [B, C,
// H, d], contiguous, of the same type: position p at slot p mod C; of more than C positions the last C stay.
// start [B] int64. Not differentiable.
void cache_store(const at::Tensor& cache, const at::Tensor& values, const at::Tensor& start);

// The same in torch operations.
void cache_store_reference(const at::Tensor& cache, const at::Tensor& values, const at::Tensor& start);

}  // namespace megalodon::ops
