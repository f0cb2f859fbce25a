#include <ATen/ATen.h>

#include "ops/check.h"
#include "ops/rms_norm/rms_norm.h"

namespace megalodon::ops {

at::Tensor rms_norm_reference(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps) {
  const auto x_ = x.to(statistics_type(x));
  const auto normal = x_ * (x_.square().mean(-1, true) + eps).rsqrt();
  return (weight ? normal * (1 + *weight) : normal).to(x.scalar_type());
}

}  // namespace megalodon::ops
