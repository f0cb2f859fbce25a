#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace megalodon::ops {

// A matrix x [R, C] in float8 with one scale: x = rows scale, rounded.
struct Float8 {
  at::Tensor rows;     // [R, C], or undefined
  at::Tensor columns;  // [C, R], its transpose; or undefined
  at::Tensor scale;    // a float32 number on the device of x
};

// x in at::kFloat8_e4m3fn (3 bits of mantissa, largest 448) or at::kFloat8_e5m2 (2 bits, largest 57344),
// scaled so that the largest absolute value of x becomes the type's. Of x with a number that is not finite
// all are NaN. x bfloat16, or on a CPU float32 too. Not differentiable.
Float8 to_float8(const at::Tensor& x, at::ScalarType type, bool rows, bool columns);

struct Float8ProductOptions {
  at::ScalarType type;                   // of the result: bfloat16 or float32
  bool fast_sums = false;                // on a GPU: partial sums are kept in fewer bits
  std::optional<at::Tensor> bias = {};   // [N] bfloat16 (or of `type`)
  std::optional<at::Tensor> added = {};  // [M, N] of `type`
};
// a b^T times their scales, + bias + added, with sums in float32: a [M, K] and b [N, K] float8, not both
// e5m2.
at::Tensor float8_product(const at::Tensor& a, const at::Tensor& a_scale, const at::Tensor& b,
                          const at::Tensor& b_scale, const Float8ProductOptions& options);

// Whether float8 products of such sizes can be made for x, of [M, K] and [N, K]: all are multiples of 16.
bool suits_float8(const at::Tensor& x, int64_t M, int64_t N, int64_t K);
// Whether the device of x is a GPU that makes them by units of its own; a CPU makes the same products in
// float32.
bool has_float8_units(const at::Tensor& x);

// The same in plain torch operations.
Float8 to_float8_reference(const at::Tensor& x, at::ScalarType type, bool rows, bool columns);
at::Tensor float8_product_reference(const at::Tensor& a, const at::Tensor& a_scale, const at::Tensor& b,
                                    const at::Tensor& b_scale, const Float8ProductOptions& options);

}  // namespace megalodon::ops
