#include "ops/cast_transposed/cast_transposed.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {

at::Tensor cast_transposed(const at::Tensor& x) {
  check_type("cast_transposed", "x", x, at::kFloat);
  check_shape("cast_transposed", "x", x, {-1, -1});
  if (!x.is_cuda() || !has_fast_kernel(x)) return cast_transposed_reference(x);
  static const auto op = registered<at::Tensor(const at::Tensor&)>("megalodon::cast_transposed");
  return op.call(x).t();
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("cast_transposed(Tensor x) -> Tensor");
}

}  // namespace megalodon::ops
