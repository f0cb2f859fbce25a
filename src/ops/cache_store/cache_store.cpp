#include "ops/cache_store/cache_store.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {

void cache_store(const at::Tensor& cache, const at::Tensor& values, const at::Tensor& start) {
  constexpr auto op = "cache_store";
  check_activation(op, "values", values, 4);
  check_type(op, "cache", cache, values.scalar_type());
  check_shape(op, "cache", cache, {values.size(0), -1, values.size(2), values.size(3)});
  TORCH_CHECK(cache.is_contiguous(), "[cache_store] cache: expected a contiguous tensor, got strides ",
              cache.strides());
  check_type(op, "start", start, at::kLong);
  check_shape(op, "start", start, {values.size(0)});
  static const auto kernel = registered<decltype(cache_store_reference)>("megalodon::cache_store");
  has_fast_kernel(values) ? kernel.call(cache, values, start) : cache_store_reference(cache, values, start);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("cache_store(Tensor(a!) cache, Tensor values, Tensor start) -> ()");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("cache_store", &cache_store_reference);
}

}  // namespace megalodon::ops
