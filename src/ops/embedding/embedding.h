#pragma once
#include <ATen/core/Tensor.h>

namespace megalodon::ops {

// Rows of table [V, D] for tokens [...] int64 in 0..V-1: [..., D] as table. Differentiable in table. On a GPU
// the gradient of a small float32 table is summed in an order that depends on the shapes alone; torch does
// the rest.
at::Tensor embedding(const at::Tensor& table, const at::Tensor& tokens);

// The same without a derivative.
at::Tensor chosen_rows(const at::Tensor& table, const at::Tensor& tokens);

// Rows x [N, D] summed by token: [V, D] float32 (float64), for tokens [...], N of them, in 0..V-1. As a
// product, so that a GPU's sums in bfloat16 are in float32 and take what reading x takes.
at::Tensor token_sums(const at::Tensor& x, const at::Tensor& tokens, int64_t V);

// The same by torch alone.
at::Tensor embedding_reference(const at::Tensor& table, const at::Tensor& tokens);

}  // namespace megalodon::ops
