#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

// Products by cuBLASLt. Which of its algorithms is the fastest is found by timing, once for products of a
// kind and about a size; in deterministic mode and while a graph is recorded it is the library's own guess,
// unless a graph's was timed before.
namespace megalodon::ops {

struct ProductOperand {
  const at::Tensor& x;    // rows or columns lie in memory
  at::Tensor scale = {};  // a float32 number on the device that multiplies it; of float8 alone
};

struct ProductOptions {
  std::optional<at::Tensor> bias = {};   // [N] of the type of y, or bfloat16 beside float32
  std::optional<at::Tensor> added = {};  // [M, N] of the type of y, as it lies; may be y
  bool fast_sums = false;                // of float8: partial sums are kept in fewer bits
};

// y [M, N] = a b + bias + added, with sums in float32 and one rounding; a [M, K] and b [K, N] both bfloat16,
// or of the float8 types, not both e5m2, in multiples of 16, rows of a and columns of b in memory.
void product_into(const at::Tensor& y, const ProductOperand& a, const ProductOperand& b,
                  const ProductOptions& options);

}  // namespace megalodon::ops
