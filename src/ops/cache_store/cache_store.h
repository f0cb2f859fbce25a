#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// Writes keys or values [B, L, H, d] of positions start[b] .. start[b] + L - 1 into the ring beside them, [B,
// C, H, d], contiguous, of the same type: position p at slot p mod C; of more than C positions the last C
// stay. All have one B and L and, beside each other, one type. start [B] int64. Not differentiable.
void cache_store(at::TensorList caches, at::TensorList values, const at::Tensor& start);

// The same in torch operations.
void cache_store_reference(at::TensorList caches, at::TensorList values, const at::Tensor& start);

}  // namespace megalodon::ops
