#include "ops/check.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "ops/device.h"

namespace megalodon::ops {
namespace {
std::string shape_text(at::IntArrayRef shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += shape[i] < 0 ? "any" : std::to_string(shape[i]);
  }
  return text + "]";
}
}  // namespace

void check_shape(const char* op, const char* argument, const at::Tensor& x, at::IntArrayRef shape) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (std::size_t i = 0; same && i < shape.size(); ++i)
    same = shape[i] < 0 || x.size(static_cast<int64_t>(i)) == shape[i];
  TORCH_CHECK(same, "[", op, "] ", argument, ": expected shape ", shape_text(shape), ", got ",
              shape_text(x.sizes()));
}

void check_type(const char* op, const char* argument, const at::Tensor& x, at::ScalarType expected) {
  TORCH_CHECK(x.scalar_type() == expected, "[", op, "] ", argument, ": expected ", expected, ", got ",
              x.scalar_type());
}

void check_activation(const char* op, const char* argument, const at::Tensor& x, int64_t dimensions) {
  TORCH_CHECK(
      x.scalar_type() != at::kHalf, "[", op, "] ", argument,
      ": float16 is not supported: EMA states and cumulative statistics overflow its range; use bfloat16");
  TORCH_CHECK(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kDouble,
      "[", op, "] ", argument, ": expected float32, bfloat16 or float64, got ", x.scalar_type());
  TORCH_CHECK(dimensions < 0 || x.dim() == dimensions, "[", op, "] ", argument, ": expected ", dimensions,
              " dimensions, got shape ", shape_text(x.sizes()));
}

at::ScalarType statistics_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

bool has_fast_kernel(const at::Tensor& x) {
  return (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) &&
         (x.is_cpu() || (x.is_cuda() && has_cuda_kernels()));
}

bool needs_gradient(at::TensorList tensors) {
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& x) {
           return x.defined() && x.requires_grad();
         });
}

}  // namespace megalodon::ops
