#include <ATen/ATen.h>

#include "ops/linear_add/linear_add.h"

namespace megalodon::ops {

at::Tensor linear_add_reference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& added) {
  const auto w = weight.transpose(-2, -1);
  return x.dim() == 3 ? at::baddbmm(added, x, w) : at::addmm(added, x, w);
}

}  // namespace megalodon::ops
