#include "ops/rms_norm/rms_norm.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"

namespace megalodon::ops {
namespace {

void check(const at::Tensor& x, const std::optional<at::Tensor>& weight) {
  check_activation("rms_norm", "x", x);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "[rms_norm] x: expected at least one feature, got shape ",
              x.sizes());
  if (!weight) return;
  check_type("rms_norm", "weight", *weight, statistics_type(x));
  check_shape("rms_norm", "weight", *weight, {x.size(-1)});
}

at::Tensor composite(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps) {
  check(x, weight);
  return rms_norm_reference(x, weight, eps);
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("megalodon::rms_norm", "").typed<decltype(composite)>();
  return op.call(x, weight, eps);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("rms_norm(Tensor x, Tensor? weight=None, float eps=1e-05) -> Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CompositeImplicitAutograd, m) {
  m.impl("rms_norm", &composite);
}

}  // namespace megalodon::ops
