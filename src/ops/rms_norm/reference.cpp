#include <ATen/ATen.h>

#include "ops/check.h"
#include "ops/rms_norm/rms_norm.h"

namespace megalodon::ops {

at::Tensor rms_norm_reference(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps) {
  const auto x_ = x.to(statistics_type(x));
  const auto normal = x_ * (x_.square().mean(-1, true) + eps).rsqrt();
  if (!weight) return normal.to(x.scalar_type());
  const auto groups = normal.reshape({weight->numel() / x.size(-1), -1, x.size(-1)});  // [K, rows, D]
  return (groups * (1 + weight->reshape({-1, 1, x.size(-1)}))).view(x.sizes()).to(x.scalar_type());
}

}  // namespace megalodon::ops
