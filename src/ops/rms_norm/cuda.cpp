#include "ops/rms_norm/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {
using Parameter = std::optional<at::Tensor>;
using Tensors2 = std::tuple<at::Tensor, at::Tensor>;

// A weight [K, D] has one for each K-th of the rows.
int64_t weight_count(const Parameter& weight) {
  return weight && weight->dim() == 2 ? weight->size(0) : 1;
}

// y, and 1/sqrt(mean(x^2) + eps) of each row.
Tensors2 forward(const at::Tensor& x, const Parameter& weight, double eps) {
  const auto D = x.size(-1), rows = x.numel() / D, K = weight_count(weight);
  const auto x_ = x.contiguous(), weight_ = weight ? weight->contiguous() : at::Tensor();
  const auto y = at::empty_like(x_), rstd = at::empty({rows}, x.options().dtype(at::kFloat));
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::rms_norm_forward(pointer<T>(x_), pointer<float>(weight_), static_cast<float>(eps), K, rows / K, D,
                           mutable_pointer<T>(y), mutable_pointer<float>(rstd), stream);
  });
  return {y, rstd};
}

Tensors2 backward(const at::Tensor& x, const Parameter& weight, const at::Tensor& rstd,
                  const at::Tensor& dy) {
  const auto D = x.size(-1), rows = x.numel() / D, K = weight_count(weight);
  const auto blocks = std::max<int64_t>(1, row_tile_blocks(rows, D * x.element_size()) / K);
  const auto x_ = x.contiguous(), dy_ = dy.contiguous(), dx = at::empty_like(x_);
  const auto weight_ = weight ? weight->contiguous() : at::Tensor();
  const auto d_weight = weight ? at::empty({blocks, K, D}, weight->options()) : at::Tensor();
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::rms_norm_backward(pointer<T>(x_), pointer<float>(weight_), pointer<float>(rstd), pointer<T>(dy_), K,
                            rows / K, D, blocks, mutable_pointer<T>(dx), mutable_pointer<float>(d_weight),
                            stream);
  });
  if (!weight) return {dx, {}};
  return {dx, sum_of_blocks(d_weight).view(weight->sizes())};
}

at::Tensor infer(const at::Tensor& x, const Parameter& weight, double eps) {
  return std::get<0>(forward(x, weight, eps));
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("rms_norm", &infer);
  m.impl("rms_norm_forward", &forward);
  m.impl("rms_norm_backward", &backward);
}

}  // namespace megalodon::ops
