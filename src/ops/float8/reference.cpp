#include <ATen/ATen.h>

#include <cmath>

#include "ops/float8/float8.h"
#include "ops/float8/largest.h"

namespace megalodon::ops {

Float8 to_float8_reference(const at::Tensor& x, at::ScalarType type, bool rows, bool columns) {
  const auto largest = type == at::kFloat8_e4m3fn ? kLargestE4m3 : kLargestE5m2;
  const auto x_ = x.to(at::kFloat);
  const auto most = x.numel() == 0 ? at::zeros({}, x_.options()) : x_.abs().max();
  const auto scale = at::where(most.eq(0), at::ones_like(most), most / largest);
  const auto scaled = (x_ * scale.reciprocal()).clamp(-largest, largest);
  const auto values = at::where(most.isfinite(), scaled, at::full_like(most, std::nan(""))).to(type);
  return {rows ? values : at::Tensor(), columns ? values.t().contiguous() : at::Tensor(), scale};
}

at::Tensor float8_product_reference(const at::Tensor& a, const at::Tensor& a_scale, const at::Tensor& b,
                                    const at::Tensor& b_scale, const Float8ProductOptions& o) {
  auto y = at::mm(a.to(at::kFloat), b.to(at::kFloat).t()) * (a_scale * b_scale);
  if (o.bias) y += o.bias->to(at::kFloat);
  if (o.added) y += o.added->to(at::kFloat);
  return y.to(o.type);
}

}  // namespace megalodon::ops
