#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "model/layers.h"
#include "model/parameters.h"
#include "model/projection.h"

namespace megalodon::model {

struct SwigluOptions {
  std::optional<at::Tensor> added = {};  // [..., D], added inside the product
  std::optional<at::Tensor> bias = {};   // one that a has in it (ops/swiglu/swiglu.h): has its gradient too
  at::Tensor hidden = {};                // silu(a) b, where it was made already
  bool keeps_hidden = false;             // for the backward pass, which makes it again otherwise
  LeftProduct product = {};              // of `hidden`: the result is its placeholder
};

// drop(silu(a) b) W^T, or drop(silu(a)) W^T without b; a, b [..., F], weight [D, F] as in project(). The
// backward pass has what is projected from the kernel of the activation's gradients, unless it was kept.
at::Tensor project_swiglu(const at::Tensor& a, const std::optional<at::Tensor>& b, const Weight& weight,
                          const Drop& drop, const SwigluOptions& options = {});

}  // namespace megalodon::model
