#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace megalodon::ops {

// A residual stream in float32 takes up what a block adds, and is normalised for the next one's products.
struct AddRmsNorm {
  at::Tensor sum;     // x + added, as x
  at::Tensor normal;  // sum / sqrt(mean(sum^2) + eps) * factor over the last dimension, in `type`
};

// x [..., D] float32 (float64 runs the reference), added as x in shape and of `type`, or none; factor [D] as
// x, or [K, D] with each for its K-th of the rows; `type` float32 or bfloat16 (float64). Differentiable in
// tensors; keeps the sum alone.
AddRmsNorm add_rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& added, const at::Tensor& factor,
                        double eps, at::ScalarType type);

// The same in the kernel that GPUs have for rows of up to 2048 features, of 8192 in multiples of 4, without a
// derivative; and of each row 1 / sqrt(mean(sum^2) + eps), from which that can be had.
std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm_forward(const at::Tensor& x,
                                                                    const std::optional<at::Tensor>& added,
                                                                    const at::Tensor& factor, double eps,
                                                                    at::ScalarType type);
// From these three, whichever kernel made them of x and `added`: the first two with a derivative.
AddRmsNorm add_rms_norm_results(const at::Tensor& x, const std::optional<at::Tensor>& added,
                                const at::Tensor& factor,
                                const std::tuple<at::Tensor, at::Tensor, at::Tensor>& made);

// The same by one operator after the other. Any device and type.
AddRmsNorm add_rms_norm_reference(const at::Tensor& x, const std::optional<at::Tensor>& added,
                                  const at::Tensor& factor, double eps, at::ScalarType type);

}  // namespace megalodon::ops
