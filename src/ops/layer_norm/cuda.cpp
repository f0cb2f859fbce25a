#include "ops/layer_norm/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {
using Parameter = std::optional<at::Tensor>;
using Tensors3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// y, and the mean and reciprocal deviation of each row.
Tensors3 forward(const at::Tensor& x, const Parameter& weight, const Parameter& bias, double eps) {
  const auto D = x.size(-1), rows = x.numel() / D;
  const auto x_ = x.contiguous(), y = at::empty_like(x_);
  const auto weight_ = weight ? weight->contiguous() : at::Tensor();
  const auto bias_ = bias ? bias->contiguous() : at::Tensor();
  const auto mean = at::empty({rows}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::layer_norm_forward(pointer<T>(x_), pointer<float>(weight_), pointer<float>(bias_),
                             static_cast<float>(eps), rows, D, mutable_pointer<T>(y),
                             mutable_pointer<float>(mean), mutable_pointer<float>(rstd), stream);
  });
  return {y, mean, rstd};
}

Tensors3 backward(const at::Tensor& x, const Parameter& weight, const at::Tensor& mean,
                  const at::Tensor& rstd, const at::Tensor& dy) {
  const auto D = x.size(-1), rows = x.numel() / D;
  const auto blocks = row_tile_blocks(rows, D * x.element_size());
  const auto x_ = x.contiguous(), dy_ = dy.contiguous(), dx = at::empty_like(x_);
  const auto weight_ = weight ? weight->contiguous() : at::Tensor();
  const auto sums = weight ? at::empty({blocks, 2, D}, weight->options()) : at::Tensor();
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::layer_norm_backward(pointer<T>(x_), pointer<float>(weight_), pointer<float>(mean),
                              pointer<float>(rstd), pointer<T>(dy_), rows, D, blocks, mutable_pointer<T>(dx),
                              mutable_pointer<float>(sums), stream);
  });
  if (!weight) return {dx, {}, {}};
  const auto d_parameters = sum_of_blocks(sums);
  return {dx, d_parameters[0], d_parameters[1]};
}

at::Tensor infer(const at::Tensor& x, const Parameter& weight, const Parameter& bias, double eps) {
  return std::get<0>(forward(x, weight, bias, eps));
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("layer_norm", &infer);
  m.impl("layer_norm_forward", &forward);
  m.impl("layer_norm_backward", &backward);
}

}  // namespace megalodon::ops
