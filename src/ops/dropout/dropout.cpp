#include "ops/dropout/dropout.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"

namespace megalodon::ops {
namespace {

at::Tensor composite(const at::Tensor& x, double p, int64_t key) {
  check_activation("dropout", "x", x);
  TORCH_CHECK(p >= 0 && p < 1, "[dropout] p: expected 0 <= p < 1, got ", p);
  return dropout_reference(x, p, key);
}

}  // namespace

at::Tensor dropout(const at::Tensor& x, double p, int64_t key) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("megalodon::dropout", "").typed<decltype(composite)>();
  return op.call(x, p, key);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("dropout(Tensor x, float p, int key) -> Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CompositeImplicitAutograd, m) {
  m.impl("dropout", &composite);
}

}  // namespace megalodon::ops
