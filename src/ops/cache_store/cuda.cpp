#include "ops/cache_store/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

void store(const at::Tensor& cache, const at::Tensor& values, const at::Tensor& start) {
  const int64_t B = values.size(0), L = values.size(1), C = cache.size(1), kept = std::min(L, C);
  const int64_t width = values.size(2) * values.size(3);
  if (B * kept * width == 0) return;
  const auto values_ = values.contiguous(), start_ = start.contiguous();
  launch_typed(values, [&]<class T>(T*, cudaStream_t stream) {
    cuda::cache_store(pointer<T>(values_), pointer<int64_t>(start_), B, L, kept, C, width,
                      mutable_pointer<T>(cache), stream);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("cache_store", &store);
}

}  // namespace megalodon::ops
