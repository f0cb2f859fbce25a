#include "ops/cache_store/cache_store.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {

void cache_store(at::TensorList caches, at::TensorList values, const at::Tensor& start) {
  constexpr auto op = "cache_store";
  TORCH_CHECK(caches.size() == values.size(), "[cache_store] values: expected ", caches.size(),
              " tensors, as caches, got ", values.size());
  for (std::size_t i = 0; i < caches.size(); ++i) {
    const auto &cache = caches[i], &x = values[i];
    check_activation(op, "values", x, 4);
    check_type(op, "values", x, values[0].scalar_type());
    check_shape(op, "values", x, {values[0].size(0), values[0].size(1), -1, -1});
    check_type(op, "cache", cache, x.scalar_type());
    check_shape(op, "cache", cache, {x.size(0), -1, x.size(2), x.size(3)});
    TORCH_CHECK(cache.is_contiguous(), "[cache_store] cache: expected a contiguous tensor, got strides ",
                cache.strides());
    check_type(op, "start", start, at::kLong);
    check_shape(op, "start", start, {x.size(0)});
  }
  if (caches.empty()) return;
  static const auto kernel = registered<decltype(cache_store_reference)>("megalodon::cache_store");
  has_fast_kernel(values[0]) ? kernel.call(caches, values, start)
                             : cache_store_reference(caches, values, start);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("cache_store(Tensor(a!)[] caches, Tensor[] values, Tensor start) -> ()");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("cache_store", &cache_store_reference);
}

}  // namespace megalodon::ops
