#include "ops/cache_store/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

void store(at::TensorList caches, at::TensorList values, const at::Tensor& start) {
  const auto start_ = start.contiguous();
  std::vector<at::Tensor> held;
  launch_typed(values[0], [&]<class T>(T*, cudaStream_t stream) {
    cuda::CacheStores<T> stores{};
    stores.start = pointer<int64_t>(start_), stores.B = start.size(0), stores.L = values[0].size(1);
    for (std::size_t i = 0; i < caches.size(); ++i) {
      const int64_t C = caches[i].size(1);
      auto x = values[i].flatten(2);  // [B, L, width]
      if (x.stride(2) != 1) x = x.contiguous();
      stores.store[stores.count++] = {.values = pointer<T>(x),
                                      .cache = mutable_pointer<T>(caches[i]),
                                      .row_step = x.stride(0),
                                      .step = x.stride(1),
                                      .kept = std::min(stores.L, C),
                                      .C = C,
                                      .width = x.size(2)};
      held.push_back(std::move(x));
      if (stores.count == cuda::kMostCacheStores || i + 1 == caches.size()) {
        cuda::cache_store(stores, stream);
        stores.count = 0;
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("cache_store", &store);
}

}  // namespace megalodon::ops
