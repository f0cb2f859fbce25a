#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "model/layers.h"
#include "model/parameters.h"

namespace megalodon::model {

// drop(silu(a) b) W^T, or drop(silu(a)) W^T without b; a, b [..., F], weight [D, F] as in project(). With
// `added` [..., D] that is added, inside the product.
// What is projected is not kept for the backward pass, which has it from the kernel of the activation's
// gradients; so has `bias`, one that a has in it (ops/swiglu/swiglu.h), its gradient.
at::Tensor project_swiglu(const at::Tensor& a, const std::optional<at::Tensor>& b, const Weight& weight,
                          const Drop& drop, const std::optional<at::Tensor>& added = {},
                          const std::optional<at::Tensor>& bias = {});

}  // namespace megalodon::model
