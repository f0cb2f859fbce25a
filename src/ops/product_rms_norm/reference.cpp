#include <ATen/ATen.h>

#include "ops/product_rms_norm/product_rms_norm.h"

namespace megalodon::ops {

ProductRmsNorm product_rms_norm_reference(const at::Tensor& x, const at::Tensor& weight,
                                          const at::Tensor& residual, const at::Tensor& factor, double eps) {
  const auto type = residual.scalar_type();
  const auto sum = residual + at::matmul(x.to(type), weight.to(type).t());
  const auto rstd = at::rsqrt(sum.square().mean(-1) + eps);
  return {sum, (sum * rstd.unsqueeze(-1) * factor).to(x.scalar_type()), rstd};
}

ProductRmsNormGradients product_rms_norm_gradients_reference(const at::Tensor& dy, const at::Tensor& weight,
                                                             const at::Tensor& sum, const at::Tensor& factor,
                                                             const at::Tensor& rstd,
                                                             const std::optional<at::Tensor>& d_sum) {
  const auto type = sum.scalar_type();
  const auto d = at::matmul(dy.to(type), weight.to(type)), g = d * factor, r = rstd.unsqueeze(-1),
             x = sum * r;
  const auto of_norm = r * (g - x * (g * x).mean(-1, true));
  const auto dx = d_sum ? *d_sum + of_norm : of_norm;
  return {dx, dx.to(dy.scalar_type()), (d * x).sum(0)};
}

}  // namespace megalodon::ops
