#include "ops/adamw/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {

void step(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
          at::TensorList second_moments, at::TensorList rounded, const at::Tensor& steps,
          const at::Tensor& divisors, const at::Tensor& rate, const at::Tensor& skip, double beta1,
          double beta2, double eps, double weight_decay) {
  const int64_t K = divisors.size(0);
  std::vector<at::Tensor> contiguous;  // gradients, as long as their pointers are used
  std::vector<cuda::AdamWPart> parts;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    contiguous.push_back(gradients[i].contiguous());
    const int64_t each = parameters[i].numel() / K;
    for (int64_t k = 0; k < K; ++k) {
      const auto of_model = [&](const at::Tensor& x) { return mutable_pointer<float>(x) + k * each; };
      parts.push_back({of_model(parameters[i]), of_model(contiguous[i]), of_model(first_moments[i]),
                       of_model(second_moments[i]),
                       rounded[i].numel() > 0 ? mutable_pointer<Bfloat16>(rounded[i]) + k * each : nullptr,
                       each, k});
    }
  }
  const auto scratch = at::empty({3}, steps.options());
  launch(steps, [&](cudaStream_t stream) {
    cuda::adamw(parts, mutable_pointer<float>(steps), pointer<float>(divisors), pointer<float>(rate),
                pointer<float>(skip), {beta1, beta2, eps, weight_decay}, mutable_pointer<float>(scratch),
                stream);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("adamw_", &step);
}

}  // namespace megalodon::ops
