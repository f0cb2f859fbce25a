#include "ops/timestep_norm/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "ops/cuda_launch.h"
#include "ops/norm_cema_step/cuda.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;
using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors5 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors6 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Tensors6 run_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                     const at::Tensor& count, const at::Tensor& mean, const at::Tensor& var,
                     const Optional& padding_mask, double eps, bool keep_steps) {
  const cuda::TimestepNormShape shape{x.size(0), x.size(1), x.size(2), mean.size(1)};
  const auto x_ = x.contiguous(), weight_ = weight.contiguous(), bias_ = bias.contiguous();
  const auto count_ = count.contiguous(), mean_ = mean.contiguous(), var_ = var.contiguous();
  const auto mask = padding_mask ? padding_mask->contiguous() : at::Tensor();
  const auto y = at::empty_like(x_), last_count = at::empty_like(count_), last_mean = at::empty_like(mean_),
             last_var = at::empty_like(var_);
  const auto steps = [&](int64_t L) {
    return keep_steps ? at::empty({shape.B, shape.G, L}, mean_.options()) : at::Tensor();
  };
  const auto step_mean = steps(shape.L + 1), step_rstd = steps(shape.L);
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::timestep_norm_forward<T>(shape,
                                   {.x = pointer<T>(x_),
                                    .weight = pointer<float>(weight_),
                                    .bias = pointer<float>(bias_),
                                    .count = pointer<int64_t>(count_),
                                    .mean = pointer<float>(mean_),
                                    .var = pointer<float>(var_),
                                    .mask = pointer<uint8_t>(mask),
                                    .eps = static_cast<float>(eps),
                                    .y = mutable_pointer<T>(y),
                                    .last_mean = mutable_pointer<float>(last_mean),
                                    .last_var = mutable_pointer<float>(last_var),
                                    .step_mean = mutable_pointer<float>(step_mean),
                                    .step_rstd = mutable_pointer<float>(step_rstd)},
                                   mutable_pointer<int64_t>(last_count), stream);
  });
  return {y, last_count, last_mean, last_var, step_mean, step_rstd};
}

// One step.
Tensors4 run_step(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                  const at::Tensor& count, const at::Tensor& mean, const at::Tensor& var, double eps) {
  const auto x_ = x.contiguous(), weight_ = weight.contiguous(), bias_ = bias.contiguous();
  const auto count_ = count.contiguous(), mean_ = mean.contiguous(), var_ = var.contiguous();
  const auto y = at::empty_like(x_), last_count = at::empty_like(count_), last_mean = at::empty_like(mean_),
             last_var = at::empty_like(var_);
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::NormCemaStep<T> step{};
    step.B = x.size(0), step.D = x.size(2), step.G = mean.size(1), step.eps = static_cast<float>(eps);
    step.x = pointer<T>(x_), step.weight = pointer<float>(weight_), step.bias = pointer<float>(bias_);
    step.count = pointer<int64_t>(count_);
    step.mean = pointer<float>(mean_), step.var = pointer<float>(var_);
    step.normal = mutable_pointer<T>(y), step.next_count = mutable_pointer<int64_t>(last_count);
    step.next_mean = mutable_pointer<float>(last_mean), step.next_var = mutable_pointer<float>(last_var);
    cuda::norm_cema_step(step, stream);
  });
  return {y, last_count, last_mean, last_var};
}

Tensors4 infer(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& count,
               const at::Tensor& mean, const at::Tensor& var, const Optional& padding_mask, double eps) {
  const int64_t features = x.size(2) / mean.size(1);
  if (x.size(1) == 1 && !padding_mask && features >= 2 && features <= cuda::kMostNormStepFeatures)
    return run_step(x, weight, bias, count, mean, var, eps);
  const auto [y, last_count, last_mean, last_var, step_mean, step_rstd] =
      run_forward(x, weight, bias, count, mean, var, padding_mask, eps, false);
  return {y, last_count, last_mean, last_var};
}

Tensors6 forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                 const at::Tensor& count, const at::Tensor& mean, const at::Tensor& var,
                 const Optional& padding_mask, double eps) {
  return run_forward(x, weight, bias, count, mean, var, padding_mask, eps, true);
}

Tensors5 backward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& last_count,
                  const Optional& padding_mask, const at::Tensor& step_mean, const at::Tensor& step_rstd,
                  const at::Tensor& dy, const Optional& d_last_mean, const Optional& d_last_var,
                  at::TensorList added) {
  const cuda::TimestepNormShape shape{x.size(0), x.size(1), x.size(2), step_mean.size(1)};
  const auto x_ = x.contiguous(), weight_ = weight.contiguous(), dy_ = dy.contiguous();
  const auto count_ = last_count.contiguous();
  const auto d_last_mean_ = d_last_mean ? d_last_mean->contiguous() : at::Tensor(),
             d_last_var_ = d_last_var ? d_last_var->contiguous() : at::Tensor();
  const auto mask = padding_mask ? padding_mask->contiguous() : at::Tensor();
  const auto dx = at::empty_like(x_), d_mean = at::empty({shape.B, shape.G}, step_mean.options()),
             d_var = at::empty_like(d_mean);
  std::array<at::Tensor, 2> added_;
  TORCH_CHECK(added.size() <= added_.size() && (added.empty() || !padding_mask),
              "timestep_norm_backward: expected at most two gradients to add, and no mask beside them");
  std::transform(added.begin(), added.end(), added_.begin(), [](const auto& d) { return d.contiguous(); });
  const auto sums = at::empty({shape.B * cuda::timestep_norm_units(shape), 2, shape.D}, step_mean.options());
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    cuda::timestep_norm_backward<T>(shape,
                                    {.x = pointer<T>(x_),
                                     .dy = pointer<T>(dy_),
                                     .weight = pointer<float>(weight_),
                                     .last_count = pointer<int64_t>(count_),
                                     .mask = pointer<uint8_t>(mask),
                                     .step_mean = pointer<float>(step_mean),
                                     .step_rstd = pointer<float>(step_rstd),
                                     .d_last_mean = pointer<float>(d_last_mean_),
                                     .d_last_var = pointer<float>(d_last_var_),
                                     .dx = mutable_pointer<T>(dx),
                                     .d_weight = nullptr,
                                     .d_bias = nullptr,
                                     .d_mean = mutable_pointer<float>(d_mean),
                                     .d_var = mutable_pointer<float>(d_var)},
                                    {pointer<T>(added_[0]), pointer<T>(added_[1])},
                                    mutable_pointer<float>(sums), stream);
  });
  const auto d_parameters = sum_of_blocks(sums);
  return {dx, d_parameters[0], d_parameters[1], d_mean, d_var};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("timestep_norm", &infer);
  m.impl("timestep_norm_forward", &forward);
  m.impl("timestep_norm_backward", &backward);
}

}  // namespace megalodon::ops
