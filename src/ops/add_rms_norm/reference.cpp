#include <ATen/ATen.h>

#include "ops/add_rms_norm/add_rms_norm.h"
#include "ops/rms_norm/rms_norm.h"

namespace megalodon::ops {

AddRmsNorm add_rms_norm_reference(const at::Tensor& x, const std::optional<at::Tensor>& added,
                                  const at::Tensor& factor, double eps, at::ScalarType type) {
  const auto sum = added ? x + *added : x;
  return {sum, rms_norm(sum, factor - 1, eps).to(type)};
}

}  // namespace megalodon::ops
