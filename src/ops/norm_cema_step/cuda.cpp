#include "ops/norm_cema_step/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"
#include "ops/step_program/cuda.h"

namespace megalodon::ops {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> step(const at::Tensor& x, const at::Tensor& weight,
                                                    const at::Tensor& bias, double eps, const at::Tensor& p,
                                                    const at::Tensor& q, const at::Tensor& eta,
                                                    const at::Tensor& omega, const at::Tensor& count,
                                                    at::Tensor& mean, at::Tensor& var, at::Tensor& h,
                                                    bool early) {
  const auto packed = [](const at::Tensor& t) { return aligned(t.resolve_conj(), 16 / t.element_size()); };
  const auto x_ = x.contiguous(), weight_ = weight.contiguous(), bias_ = bias.contiguous();
  const auto p_ = packed(p), q_ = packed(q), eta_ = packed(eta), omega_ = omega.contiguous();
  const auto count_ = count.contiguous(), next_count = at::empty_like(count_);
  const auto normal = at::empty_like(x_), y = at::empty_like(x_);
  launch_typed(x, [&]<class T>(T*, cudaStream_t stream) {
    const cuda::NormCemaStep<T> call{.B = x.size(0),
                                     .D = x.size(2),
                                     .G = mean.size(1),
                                     .N = p.size(1),
                                     .x = pointer<T>(x_),
                                     .weight = pointer<float>(weight_),
                                     .bias = pointer<float>(bias_),
                                     .p = pointer<float>(p_),
                                     .q = pointer<float>(q_),
                                     .eta = pointer<float>(eta_),
                                     .omega = pointer<float>(omega_),
                                     .count = pointer<int64_t>(count_),
                                     .mean = pointer<float>(mean),
                                     .var = pointer<float>(var),
                                     .h = mutable_pointer<float>(h),
                                     .eps = static_cast<float>(eps),
                                     .normal = mutable_pointer<T>(normal),
                                     .y = mutable_pointer<T>(y),
                                     .next_count = mutable_pointer<int64_t>(next_count),
                                     .next_mean = mutable_pointer<float>(mean),
                                     .next_var = mutable_pointer<float>(var),
                                     .early = early};
    cuda::norm_cema_step(call, stream);
    if constexpr (std::is_same_v<T, Bfloat16>) cuda::note_call(call, stream);
  });
  return {normal, y, next_count};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("norm_cema_step", &step);
}

}  // namespace megalodon::ops
