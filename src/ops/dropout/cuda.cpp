#include "ops/dropout/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"
#include "ops/dropout/kernel.h"

namespace megalodon::ops {
namespace {

at::Tensor forward(const at::Tensor& x, double p, int64_t key) {
  const auto x_ = x.contiguous(), y = at::empty_like(x_);
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::dropout(pointer<T>(x_), static_cast<uint64_t>(key), dropout_threshold(p),
                  static_cast<float>(1 / (1 - p)), x.numel(), mutable_pointer<T>(y), stream);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("dropout", &forward);
}

}  // namespace megalodon::ops
