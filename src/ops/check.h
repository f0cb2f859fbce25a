#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "ops/bfloat16.h"

// What the operators share: argument checks whose messages name operator, argument, expected and got, and the
// choice between the fast kernels and the reference.
namespace megalodon::ops {

// `shape` entries of -1 match any size.
void check_shape(const char* op, const char* argument, const at::Tensor& x, at::IntArrayRef shape);
void check_type(const char* op, const char* argument, const at::Tensor& x, at::ScalarType expected);
// float32, bfloat16 or float64; float16 is refused: EMA states and cumulative statistics overflow it.
void check_activation(const char* op, const char* argument, const at::Tensor& x, int64_t dimensions = -1);
// The type of statistics, coefficients and states beside an activation `x`: float64 beside float64, else
// float32.
at::ScalarType statistics_type(const at::Tensor& x);

// Whether the fast kernels take this activation: a tensor of float32 or bfloat16 on the CPU, or on a GPU
// where the CUDA plugin is loaded. Others run the reference.
bool has_fast_kernel(const at::Tensor& x);

// Whether a gradient of any of these may be asked for, so that what the backward pass needs must be kept.
bool needs_gradient(at::TensorList tensors);

// Calls f with a null pointer of the kernels' element type for x: `float*` or `Bfloat16*`.
template <class F>
decltype(auto) with_element_type(const at::Tensor& x, F&& f) {
  if (x.scalar_type() == at::kFloat) return f(static_cast<float*>(nullptr));
  return f(static_cast<Bfloat16*>(nullptr));
}

// Pointers to the elements of contiguous tensors as the kernels see them; null for an undefined tensor.
template <class T>
const T* pointer(const at::Tensor& x) {
  return x.defined() ? static_cast<const T*>(x.const_data_ptr()) : nullptr;
}
template <class T>
T* mutable_pointer(const at::Tensor& x) {
  return x.defined() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

}  // namespace megalodon::ops
