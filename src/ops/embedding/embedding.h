#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// Rows of table [V, D] for tokens [...] int64 in 0..V-1: [..., D] as table. Differentiable in table. On a GPU
// the gradient of a small float32 table is summed in an order that depends on the shapes alone; torch does
// the rest.
at::Tensor embedding(const at::Tensor& table, const at::Tensor& tokens);

// The same by torch alone.
at::Tensor embedding_reference(const at::Tensor& table, const at::Tensor& tokens);

}  // namespace megalodon::ops
