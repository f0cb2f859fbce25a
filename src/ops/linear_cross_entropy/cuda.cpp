#include "ops/linear_cross_entropy/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

at::Tensor scaled(const at::Tensor& x, const at::Tensor& scales) {
  const int64_t K = scales.size(0), each = x.numel() / K;
  const auto x_ = x.contiguous(), scales_ = scales.contiguous(), y = at::empty_like(x_);
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    for (int64_t k = 0; k < K; ++k) {
      cuda::scaled(pointer<T>(x_) + k * each, pointer<float>(scales_) + k, each,
                   mutable_pointer<T>(y) + k * each, stream);
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("scaled", &scaled);
}

}  // namespace megalodon::ops
