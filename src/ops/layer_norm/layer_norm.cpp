#include "ops/layer_norm/layer_norm.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"

namespace megalodon::ops {
namespace {
using Parameter = std::optional<at::Tensor>;

void check(const at::Tensor& x, const Parameter& weight, const Parameter& bias) {
  constexpr auto op = "layer_norm";
  check_activation(op, "x", x);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "[layer_norm] x: expected at least one feature, got shape ",
              x.sizes());
  TORCH_CHECK(weight.has_value() == bias.has_value(), "[layer_norm] bias: expected ",
              weight ? "a tensor, as weight is one, got none" : "none, as weight is none, got a tensor");
  if (!weight) return;
  for (const auto& [name, parameter] : {std::pair{"weight", *weight}, {"bias", *bias}}) {
    check_type(op, name, parameter, statistics_type(x));
    check_shape(op, name, parameter, {x.size(-1)});
  }
}

at::Tensor composite(const at::Tensor& x, const Parameter& weight, const Parameter& bias, double eps) {
  check(x, weight, bias);
  return layer_norm_reference(x, weight, bias, eps);
}

}  // namespace

at::Tensor layer_norm(const at::Tensor& x, const Parameter& weight, const Parameter& bias, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("megalodon::layer_norm", "")
                             .typed<decltype(composite)>();
  return op.call(x, weight, bias, eps);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CompositeImplicitAutograd, m) {
  m.impl("layer_norm", &composite);
}

}  // namespace megalodon::ops
