#include "ops/rope/rope.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {

void check(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base) {
  check_activation("rope", "x", x, 4);
  TORCH_CHECK(x.size(3) % 2 == 0, "[rope] x: expected an even number of features in a head, got ", x.size(3));
  check_type("rope", "start", start, at::kLong);
  check_shape("rope", "start", start, {x.size(0)});
  TORCH_CHECK(chunk >= 0, "[rope] chunk: expected at least 0, got ", chunk);
  TORCH_CHECK(base > 0, "[rope] base: expected a positive number, got ", base);
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base, bool inverse) {
  check(x, start, chunk, base);
  return rope_reference(x, start, chunk, base, inverse);
}

}  // namespace

at::Tensor rope(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base, bool inverse) {
  static const auto op = registered<decltype(forward)>("megalodon::rope");
  return op.call(x, start, chunk, base, inverse);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("rope(Tensor x, Tensor start, int chunk, float base, bool inverse=False) -> Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CompositeImplicitAutograd, m) {
  m.impl("rope", &forward);
}

}  // namespace megalodon::ops
