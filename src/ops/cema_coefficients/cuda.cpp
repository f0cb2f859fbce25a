#include "ops/cema_coefficients/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {
using Tensor = at::Tensor;

// Complex tensors are pairs of floats to the kernels.
Tensor plain(const Tensor& x) {
  return x.resolve_conj().contiguous();
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& alpha, const Tensor& delta, const Tensor& theta,
                                           const Tensor& gamma) {
  const auto alpha_ = alpha.contiguous(), delta_ = delta.contiguous(), theta_ = theta.contiguous(),
             gamma_ = gamma.contiguous();
  const auto p = at::empty_like(alpha_),
             q = at::empty(alpha.sizes(), alpha.options().dtype(at::kComplexFloat)), eta = at::empty_like(q);
  launch(alpha, [&](cudaStream_t stream) {
    cuda::cema_coefficients(alpha.size(0), alpha.size(1), pointer<float>(alpha_), pointer<float>(delta_),
                            pointer<float>(theta_), pointer<float>(gamma_), mutable_pointer<float>(p),
                            mutable_pointer<float>(q), mutable_pointer<float>(eta), stream);
  });
  return {p, q, eta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& alpha, const Tensor& delta,
                                                    const Tensor& theta, const Tensor& dp, const Tensor& dq,
                                                    const Tensor& deta) {
  const auto alpha_ = alpha.contiguous(), delta_ = delta.contiguous(), theta_ = theta.contiguous();
  const auto dp_ = dp.contiguous(), dq_ = plain(dq), deta_ = plain(deta);
  const auto d_alpha = at::empty_like(alpha_), d_delta = at::empty_like(delta_),
             d_theta = at::empty_like(theta_),
             d_gamma = at::empty({alpha.size(0), alpha.size(1), 2}, alpha.options());
  launch(alpha, [&](cudaStream_t stream) {
    cuda::cema_coefficients_backward(alpha.size(0), alpha.size(1), pointer<float>(alpha_),
                                     pointer<float>(delta_), pointer<float>(theta_), pointer<float>(dp_),
                                     pointer<float>(dq_), pointer<float>(deta_),
                                     {mutable_pointer<float>(d_alpha), mutable_pointer<float>(d_delta),
                                      mutable_pointer<float>(d_theta), mutable_pointer<float>(d_gamma)},
                                     stream);
  });
  return {d_alpha, d_delta, d_theta, d_gamma};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("cema_coefficients", &forward);
  m.impl("cema_coefficients_backward", &backward);
}

}  // namespace megalodon::ops
