#include <ATen/ATen.h>

#include "ops/check.h"
#include "ops/layer_norm/layer_norm.h"

namespace megalodon::ops {

at::Tensor layer_norm_reference(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias, double eps) {
  const auto x_ = x.to(statistics_type(x));
  const auto centered = x_ - x_.mean(-1, true);
  const auto normal = centered * (centered.square().mean(-1, true) + eps).rsqrt();
  return (weight ? normal * (1 + *weight) + *bias : normal).to(x.scalar_type());
}

}  // namespace megalodon::ops
