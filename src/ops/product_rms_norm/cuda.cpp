#include "ops/product_rms_norm/cuda.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda_launch.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

bool has_kernels(const at::Tensor& x, int64_t D) {
  const c10::cuda::CUDAGuard guard(x.device());
  return D == cuda::kNormProductWidth && cuda::has_product_rms_norm();
}

// At a multiple of 16 bytes.
at::Tensor placed(const at::Tensor& x) {
  return aligned(x, 16 / x.element_size());
}

Triple forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& residual,
               const at::Tensor& factor, double eps) {
  const int64_t M = x.size(0);
  const auto x_ = placed(x), weight_ = placed(weight), residual_ = placed(residual), factor_ = placed(factor);
  const auto sum = at::empty_like(residual_), normal = at::empty(residual.sizes(), x.options()),
             rstd = at::empty({M}, residual.options());
  launch(x, [&](cudaStream_t stream) {
    cuda::product_rms_norm({.M = M,
                            .K = x.size(1),
                            .x = pointer<Bfloat16>(x_),
                            .weight = pointer<Bfloat16>(weight_),
                            .residual = pointer<float>(residual_),
                            .factor = pointer<float>(factor_),
                            .eps = static_cast<float>(eps),
                            .sum = mutable_pointer<float>(sum),
                            .normal = mutable_pointer<Bfloat16>(normal),
                            .rstd = mutable_pointer<float>(rstd)},
                           stream);
  });
  return {sum, normal, rstd};
}

Triple backward(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& sum,
                const at::Tensor& factor, const at::Tensor& rstd, const Optional& d_sum) {
  const int64_t M = dy.size(0), D = weight.size(1);
  const auto dy_ = placed(dy), weight_ = placed(weight), sum_ = placed(sum), factor_ = placed(factor),
             rstd_ = rstd.contiguous(), d_sum_ = d_sum ? placed(*d_sum) : at::Tensor();
  const auto dx = at::empty_like(sum_), d_added = at::empty(sum.sizes(), dy.options());
  at::Tensor partial;
  launch(dy, [&](cudaStream_t stream) {
    partial = at::empty({cuda::product_rms_norm_sums(M), D}, sum.options());
    cuda::product_rms_norm_gradients({.M = M,
                                      .K = dy.size(1),
                                      .dy = pointer<Bfloat16>(dy_),
                                      .weight = pointer<Bfloat16>(weight_),
                                      .sum = pointer<float>(sum_),
                                      .factor = pointer<float>(factor_),
                                      .rstd = pointer<float>(rstd_),
                                      .d_sum = pointer<float>(d_sum_),
                                      .dx = mutable_pointer<float>(dx),
                                      .d_added = mutable_pointer<Bfloat16>(d_added),
                                      .d_factor = mutable_pointer<float>(partial)},
                                     stream);
  });
  return {dx, d_added, sum_of_blocks(partial)};
}

}  // namespace

TORCH_LIBRARY_IMPL(megalodon, CUDA, m) {
  m.impl("product_rms_norm", &forward);
  m.impl("product_rms_norm_backward", &backward);
  m.impl("has_product_rms_norm", &has_kernels);
}

}  // namespace megalodon::ops
