#include <ATen/ATen.h>

#include <cmath>
#include <numbers>

#include "ops/cema_coefficients/cema_coefficients.h"

namespace megalodon::ops {

CemaCoefficients cema_coefficients_reference(const at::Tensor& alpha, const at::Tensor& delta,
                                             const at::Tensor& theta, const at::Tensor& gamma) {
  const int64_t N = alpha.size(1);
  const auto n = at::arange(1, N + 1, theta.options().requires_grad(false));
  const auto p = at::sigmoid(alpha);  // [D, N]
  const auto phi =
      at::sigmoid(theta).unsqueeze(1) * (n * (2 * std::numbers::pi / static_cast<double>(N)));  // [D, N]
  const auto q = at::polar(1 - p * at::sigmoid(delta), phi);                                    // [D, N]
  return {p, q, at::view_as_complex(gamma) * (1 / std::sqrt(static_cast<double>(N)))};
}

}  // namespace megalodon::ops
