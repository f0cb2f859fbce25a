#include "ops/cast_transposed/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

// [N, M]
at::Tensor turned(const at::Tensor& x) {
  const auto x_ = x.contiguous(), y = at::empty({x.size(1), x.size(0)}, x.options().dtype(at::kBFloat16));
  launch(x, [&](cudaStream_t stream) {
    cuda::cast_transposed(pointer<float>(x_), x.size(0), x.size(1), mutable_pointer<Bfloat16>(y), stream);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("cast_transposed", &turned);
}

}  // namespace megalodon::ops
