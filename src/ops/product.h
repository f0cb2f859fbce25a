#pragma once
#include <ATen/ATen.h>

namespace megalodon::ops {

// Products of matrices, [M, K] and [K, N], or of stacks of them, [S, M, K] and [S, K, N].
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return a.dim() == 3 ? at::bmm(a, b) : at::mm(a, b);
}

// a b in `type`: of bfloat16 in float32 without a rounding between where a device can; the CPU's is rounded.
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  if (type == a.scalar_type() || !a.is_cuda()) return product(a, b).to(type);
  return a.dim() == 3 ? at::bmm(a, b, type) : at::mm(a, b, type);
}

// sum += a b, likewise in the type of `sum`.
inline void add_product(at::Tensor sum, const at::Tensor& a, const at::Tensor& b) {
  const auto type = sum.scalar_type();
  if (type == a.scalar_type()) {
    a.dim() == 3 ? sum.baddbmm_(a, b) : sum.addmm_(a, b);
  } else if (a.is_cuda()) {
    a.dim() == 3 ? at::baddbmm_out(sum, sum, a, b, type) : at::addmm_out(sum, sum, a, b, type);
  } else {
    sum.add_(product(a, b));
  }
}

}  // namespace megalodon::ops
