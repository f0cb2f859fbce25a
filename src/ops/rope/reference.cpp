#include <ATen/ATen.h>

#include "ops/check.h"
#include "ops/rope/rope.h"

namespace megalodon::ops {

at::Tensor rope_reference(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base,
                          bool inverse) {
  const auto type = statistics_type(x);
  const int64_t d = x.size(3);
  const auto in_double = x.options().dtype(at::kDouble);
  auto position = start.unsqueeze(1) + at::arange(x.size(1), start.options());  // [B, L]
  if (chunk > 0) position = at::remainder(position, chunk);
  const auto frequency = at::pow(base, at::arange(0, d, 2, in_double) / static_cast<double>(-d));
  auto angle = position.to(in_double).unsqueeze(2).unsqueeze(3) * frequency;  // [B, L, 1, d/2]
  if (inverse) angle = -angle;
  const auto cos = angle.cos().to(type), sin = angle.sin().to(type);
  const auto pairs = x.to(type).unflatten(3, {d / 2, 2});
  const auto a = pairs.select(4, 0), b = pairs.select(4, 1);
  return at::stack({a * cos - b * sin, a * sin + b * cos}, 4).flatten(3).to(x.scalar_type());
}

}  // namespace megalodon::ops
