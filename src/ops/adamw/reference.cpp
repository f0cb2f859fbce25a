#include <ATen/ATen.h>

#include "ops/adamw/adamw.h"

namespace megalodon::ops {

void adamw_reference(const AdamWTensors& tensors, at::TensorList gradients, const at::Tensor& divisors,
                     const at::Tensor& rate, const at::Tensor& skip, const AdamWConstants& constants) {
  const int64_t K = divisors.size(0);
  for (const auto& gradient : gradients) {
    if (K > 1) gradient.view({K, -1}).div_(divisors.unsqueeze(1));
  }
  const auto divisor = K == 1 ? divisors.squeeze(0) : at::ones({}, divisors.options());
  tensors.steps.add_(1 - skip);
  const std::vector<at::Tensor> steps(tensors.parameters.size(), tensors.steps);
  at::_fused_adamw_(tensors.parameters, gradients, tensors.first_moments, tensors.second_moments, {}, steps,
                    rate, constants.beta1, constants.beta2, constants.weight_decay, constants.eps,
                    /*amsgrad=*/false,
                    /*maximize=*/false, divisor, skip);
  for (std::size_t i = 0; i < tensors.rounded.size(); ++i)
    if (tensors.rounded[i].numel() > 0) at::Tensor(tensors.rounded[i]).copy_(tensors.parameters[i]);
}

}  // namespace megalodon::ops
