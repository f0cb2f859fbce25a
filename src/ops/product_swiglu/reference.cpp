#include <ATen/ATen.h>

#include "ops/product_swiglu/product_swiglu.h"

namespace megalodon::ops {

SwigluProduct product_swiglu_reference(const at::Tensor& x, const at::Tensor& weight) {
  const auto both = at::matmul(x, weight.t()).chunk(2, -1);
  return {both[0], both[1], swiglu_reference(both[0], both[1])};
}

SwigluGradients product_swiglu_gradients_reference(const at::Tensor& dy, const at::Tensor& weight,
                                                   const at::Tensor& a, const std::optional<at::Tensor>& b,
                                                   bool biased) {
  const auto d = at::matmul(dy, weight), s = at::sigmoid(a), factor = b.value_or(at::ones_like(a));
  const auto da = d * factor * s * (1 + a * (1 - s));
  return {da, b ? d * a * s : at::Tensor(), a * s * factor,
          biased ? da.reshape({-1, da.size(-1)}).sum(0) : at::Tensor()};
}

}  // namespace megalodon::ops
