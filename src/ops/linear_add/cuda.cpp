#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_product.h"

namespace megalodon::ops {
namespace {

at::Tensor linear_add(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& added) {
  const auto x_ = x.contiguous(), weight_ = weight.contiguous().t(), added_ = added.contiguous();
  const auto y = at::empty_like(added_);
  product_into(y, {x_}, {weight_}, {.added = added_});
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("linear_add", &linear_add);
}

}  // namespace megalodon::ops
