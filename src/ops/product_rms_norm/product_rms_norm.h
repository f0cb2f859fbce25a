#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

// Products of matrices with the addition to a residual stream and the RMS norm behind them, where their
// results are at hand: on a Hopper GPU in bfloat16, with rows of 384 and K in multiples of 64, in the
// product's kernel, where the product is neither rounded nor kept; elsewhere the reference runs. None is
// differentiable.
namespace megalodon::ops {

// Whether products over K with results of D columns have that kernel, in the type of `like` and beside it.
bool has_product_rms_norm_kernel(const at::Tensor& like, int64_t K, int64_t D);

struct ProductRmsNorm {
  at::Tensor sum;     // residual + x W^T, as the residual
  at::Tensor normal;  // sum rstd factor, as x
  at::Tensor rstd;    // 1 / sqrt(mean(sum^2) + eps) of each row, as the residual
};
// x [M, K], weight W [D, K] as x; residual [M, D] and factor [D] in float32 (float64 beside float64).
ProductRmsNorm product_rms_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& residual,
                                const at::Tensor& factor, double eps);

struct ProductRmsNormGradients {
  at::Tensor dx;        // of the sum, as it
  at::Tensor d_added;   // the same, as dy
  at::Tensor d_factor;  // [D], as the sum
};
// Of the norm before a product: its result had the gradient dy W, for dy [M, K] and weight W [K, D]; the sum
// [M, D] itself, besides, d_sum or none.
ProductRmsNormGradients product_rms_norm_gradients(const at::Tensor& dy, const at::Tensor& weight,
                                                   const at::Tensor& sum, const at::Tensor& factor,
                                                   const at::Tensor& rstd,
                                                   const std::optional<at::Tensor>& d_sum);

// Both in plain torch operations, all in the type of the residual or the sum. Any device.
ProductRmsNorm product_rms_norm_reference(const at::Tensor& x, const at::Tensor& weight,
                                          const at::Tensor& residual, const at::Tensor& factor, double eps);
ProductRmsNormGradients product_rms_norm_gradients_reference(const at::Tensor& dy, const at::Tensor& weight,
                                                             const at::Tensor& sum, const at::Tensor& factor,
                                                             const at::Tensor& rstd,
                                                             const std::optional<at::Tensor>& d_sum);

}  // namespace megalodon::ops
