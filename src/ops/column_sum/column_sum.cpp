#include "ops/column_sum/column_sum.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {

at::Tensor column_sum(const at::Tensor& x) {
  check_activation("column_sum", "x", x, 2);
  static const auto op = registered<at::Tensor(const at::Tensor&)>("megalodon::column_sum");
  return has_fast_kernel(x) ? op.call(x) : column_sum_reference(x);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("column_sum(Tensor x) -> Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("column_sum", &column_sum_reference);  // torch's has no fault there
}

}  // namespace megalodon::ops
