#include <ATen/ATen.h>

#include "ops/swiglu/swiglu.h"

namespace megalodon::ops {

at::Tensor swiglu_reference(const at::Tensor& a, const std::optional<at::Tensor>& b,
                            const std::optional<at::Tensor>& bias) {
  if (bias) return swiglu_reference(a + (*bias - bias->detach()), b);
  const auto silu = a * at::sigmoid(a);
  return b ? silu * *b : silu;
}

}  // namespace megalodon::ops
