#include <ATen/ATen.h>

#include <cmath>

#include "ops/check.h"
#include "ops/query_key/query_key.h"
#include "ops/rope/rope.h"

namespace megalodon::ops {

std::pair<at::Tensor, at::Tensor> query_key_reference(const at::Tensor& z, const at::Tensor& gamma,
                                                      const at::Tensor& beta, const at::Tensor& start,
                                                      int64_t chunk, double rope_base, double eps) {
  const int64_t H = z.size(2), dz = z.size(3);
  const auto wide = z.to(statistics_type(z));
  const auto normal = wide * at::rsqrt(wide.square().mean(3, /*keepdim=*/true) + eps);
  const auto scale = ((1 + gamma) / std::sqrt(static_cast<double>(dz))).view({2, H, dz});
  const auto shift = beta.view({2, H, dz});
  const auto part = [&](int64_t i) {
    return rope_reference(normal * scale[i] + shift[i], start, chunk, rope_base).to(z.scalar_type());
  };
  return {part(0), part(1)};
}

}  // namespace megalodon::ops
