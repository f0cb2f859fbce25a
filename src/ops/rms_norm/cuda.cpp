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
  const auto D = x.size(-1), rows = x.numel() / D, K = weight_count(weight), each = rows / K;
  const auto x_ = x.contiguous(), weight_ = weight ? weight->contiguous() : at::Tensor();
  const auto y = at::empty_like(x_), rstd = at::empty({rows}, x.options().dtype(at::kFloat));
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    for (int64_t k = 0, at = 0; k < K; ++k, at += each) {
      cuda::rms_norm_forward(pointer<T>(x_) + at * D, weight ? pointer<float>(weight_) + k * D : nullptr,
                             static_cast<float>(eps), each, D, mutable_pointer<T>(y) + at * D,
                             mutable_pointer<float>(rstd) + at, stream);
    }
  });
  return {y, rstd};
}

Tensors2 backward(const at::Tensor& x, const Parameter& weight, const at::Tensor& rstd,
                  const at::Tensor& dy) {
  const auto D = x.size(-1), rows = x.numel() / D, K = weight_count(weight), each = rows / K;
  const auto blocks = row_blocks(each);
  const auto x_ = x.contiguous(), dy_ = dy.contiguous(), dx = at::empty_like(x_);
  const auto weight_ = weight ? weight->contiguous() : at::Tensor();
  const auto d_weight = weight ? at::empty({K, blocks, D}, weight->options()) : at::Tensor();
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    for (int64_t k = 0, at = 0; k < K; ++k, at += each) {
      cuda::rms_norm_backward(pointer<T>(x_) + at * D, weight ? pointer<float>(weight_) + k * D : nullptr,
                              pointer<float>(rstd) + at, pointer<T>(dy_) + at * D, each, D, blocks,
                              mutable_pointer<T>(dx) + at * D,
                              weight ? mutable_pointer<float>(d_weight) + k * blocks * D : nullptr, stream);
    }
  });
  if (!weight) return {dx, {}};
  return {dx, d_weight.sum(1, false, at::kDouble).view(weight->sizes()).to(at::kFloat)};
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
