#include <ATen/ATen.h>

#include "ops/cache_store/cache_store.h"

namespace megalodon::ops {

void cache_store_reference(at::TensorList caches, at::TensorList values, const at::Tensor& start) {
  for (std::size_t i = 0; i < caches.size(); ++i) {
    const auto &cache = caches[i], &of_cache = values[i];
    const int64_t B = of_cache.size(0), L = of_cache.size(1), C = cache.size(1), kept = std::min(L, C);
    if (kept == 0) continue;
    const auto position = start.unsqueeze(1) + at::arange(L - kept, L, start.options());        // [B, kept]
    const auto slot = at::arange(B, start.options()).unsqueeze(1) * C + position.remainder(C);  // [B, kept]
    cache.view({B * C, -1})
        .index_copy_(0, slot.view(-1), of_cache.narrow(1, L - kept, kept).reshape({B * kept, -1}));
  }
}

}  // namespace megalodon::ops
