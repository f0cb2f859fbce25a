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
      const int64_t C = caches[i].size(1), width = values[i].size(2) * values[i].size(3);
      held.push_back(with_rows(values[i].flatten(2).flatten(0, 1)));
      stores.store[stores.count++] = {pointer<T>(held.back()),
                                      mutable_pointer<T>(caches[i]),
                                      held.back().stride(0),
                                      std::min(stores.L, C),
                                      C,
                                      width};
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
