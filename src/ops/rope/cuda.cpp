#include "ops/rope/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

at::Tensor forward(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base, bool inverse) {
  const auto x_ = aligned(x, 2), start_ = start.contiguous(), y = at::empty_like(x_);
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::rope(pointer<T>(x_), pointer<int64_t>(start_), x.size(0), x.size(1), x.size(2), x.size(3), chunk,
               base, inverse, mutable_pointer<T>(y), stream);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("rope", &forward);
}

}  // namespace megalodon::ops
