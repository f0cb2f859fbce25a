#include "ops/adamw/adamw.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {

void adamw(const AdamWTensors& tensors, at::TensorList gradients, const at::Tensor& divisors,
           const at::Tensor& rate, const at::Tensor& skip, const AdamWConstants& constants) {
  const auto& parameters = tensors.parameters;
  for (const auto& [name, count] :
       {std::pair{"gradients", gradients.size()}, {"rounded", tensors.rounded.size()}}) {
    TORCH_CHECK(count == parameters.size(), "[adamw] ", name, ": expected ", parameters.size(), ", got ",
                count);
  }
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    check_type("adamw", "parameter", parameters[i], at::kFloat);
    check_type("adamw", "gradient", gradients[i], at::kFloat);
    check_shape("adamw", "gradient", gradients[i], parameters[i].sizes());
    if (tensors.rounded[i].numel() == 0) continue;
    check_type("adamw", "rounded", tensors.rounded[i], at::kBFloat16);
    check_shape("adamw", "rounded", tensors.rounded[i], parameters[i].sizes());
  }
  if (parameters.empty()) return;
  if (!parameters[0].is_cuda() || !has_fast_kernel(parameters[0]))
    return adamw_reference(tensors, gradients, divisors, rate, skip, constants);
  using Step =
      void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, const at::Tensor&,
           const at::Tensor&, const at::Tensor&, const at::Tensor&, double, double, double, double);
  static const auto op = registered<Step>("megalodon::adamw_");
  op.call(parameters, gradients, tensors.first_moments, tensors.second_moments, tensors.rounded,
          tensors.steps, divisors, rate, skip, constants.beta1, constants.beta2, constants.eps,
          constants.weight_decay);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "adamw_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, "
      "Tensor(c!)[] second_moments, Tensor(d!)[] rounded, Tensor(e!) steps, Tensor divisors, Tensor rate, "
      "Tensor skip, float beta1, float beta2, float eps, float weight_decay) -> ()");
}

}  // namespace megalodon::ops
