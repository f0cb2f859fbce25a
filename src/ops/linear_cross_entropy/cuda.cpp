#include "ops/linear_cross_entropy/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

// x [K, n, D]; each x[k] lies together.
void scale(const at::Tensor& x, const at::Tensor& scales) {
  const auto scales_ = scales.contiguous();
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    for (int64_t k = 0; k < x.size(0); ++k) {
      cuda::scale(mutable_pointer<T>(x) + k * x.stride(0), pointer<float>(scales_) + k, x.size(1) * x.size(2),
                  stream);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("scale_", &scale);
}

}  // namespace megalodon::ops
