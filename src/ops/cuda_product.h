#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

// Products by cuBLASLt that torch's do not offer.
namespace megalodon::ops {

struct ProductOperand {
  const at::Tensor& x;    // contiguous
  at::Tensor scale = {};  // a float32 number on the device that multiplies it; of float8 alone
};

struct ProductOptions {
  std::optional<at::Tensor> bias = {};   // [N] of the type of y, or bfloat16 beside float32
  std::optional<at::Tensor> added = {};  // [M, N] of the type of y; read where it lies
  bool fast_sums = false;                // of float8: partial sums are kept in fewer bits
};

// y [M, N] = a b^T + bias + added, with sums in float32 and one rounding; a [M, K] and b [N, K] both
// bfloat16, or of the float8 types, not both e5m2, in multiples of 16.
void product_into(const at::Tensor& y, const ProductOperand& a, const ProductOperand& b,
                  const ProductOptions& options);

}  // namespace megalodon::ops
