#include "ops/product_rms_norm/product_rms_norm.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

bool has_kernel(const at::Tensor& x, int64_t D) {
  return x.numel() > 0 && has_product_rms_norm_kernel(x, x.size(1), D);
}

// Beside an activation [M, K]: x [M, D].
void check_rows(const char* op, const char* name, const at::Tensor& x, const at::Tensor& activation,
                int64_t D) {
  check_type(op, name, x, statistics_type(activation));
  check_shape(op, name, x, {activation.size(0), D});
}
// Beside that: x [count].
void check_numbers(const char* op, const char* name, const at::Tensor& x, const at::Tensor& rows,
                   int64_t count) {
  check_type(op, name, x, rows.scalar_type());
  check_shape(op, name, x, {count});
}

}  // namespace

bool has_product_rms_norm_kernel(const at::Tensor& like, int64_t K, int64_t D) {
  if (!like.is_cuda() || !has_fast_kernel(like) || like.scalar_type() != at::kBFloat16) return false;
  if (K == 0 || K % 64 != 0) return false;
  static const auto op = registered<bool(const at::Tensor&, int64_t)>("megalodon::has_product_rms_norm");
  return op.call(like, D);
}

ProductRmsNorm product_rms_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& residual,
                                const at::Tensor& factor, double eps) {
  constexpr auto op = "product_rms_norm";
  check_activation(op, "x", x, 2);
  check_type(op, "weight", weight, x.scalar_type());
  check_shape(op, "weight", weight, {-1, x.size(1)});
  const int64_t D = weight.size(0);
  check_rows(op, "residual", residual, x, D);
  check_numbers(op, "factor", factor, residual, D);
  if (!has_kernel(x, D)) return product_rms_norm_reference(x, weight, residual, factor, eps);
  using Call = Triple(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double);
  static const auto call = registered<Call>("megalodon::product_rms_norm");
  const auto [sum, normal, rstd] = call.call(x, weight, residual, factor, eps);
  return {sum, normal, rstd};
}

ProductRmsNormGradients product_rms_norm_gradients(const at::Tensor& dy, const at::Tensor& weight,
                                                   const at::Tensor& sum, const at::Tensor& factor,
                                                   const at::Tensor& rstd, const Optional& d_sum) {
  constexpr auto op = "product_rms_norm_gradients";
  check_activation(op, "dy", dy, 2);
  check_type(op, "weight", weight, dy.scalar_type());
  check_shape(op, "weight", weight, {dy.size(1), -1});
  const int64_t D = weight.size(1);
  check_rows(op, "sum", sum, dy, D);
  if (d_sum) check_rows(op, "d_sum", *d_sum, dy, D);
  check_numbers(op, "factor", factor, sum, D);
  check_numbers(op, "rstd", rstd, sum, dy.size(0));
  if (!has_kernel(dy, D)) return product_rms_norm_gradients_reference(dy, weight, sum, factor, rstd, d_sum);
  using Call = Triple(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                      const at::Tensor&, const Optional&);
  static const auto call = registered<Call>("megalodon::product_rms_norm_backward");
  const auto [dx, d_added, d_factor] = call.call(dy, weight, sum, factor, rstd, d_sum);
  return {dx, d_added, d_factor};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "product_rms_norm(Tensor x, Tensor weight, Tensor residual, Tensor factor, float eps) -> "
      "(Tensor sum, Tensor normal, Tensor rstd)");
  m.def(
      "product_rms_norm_backward(Tensor dy, Tensor weight, Tensor sum, Tensor factor, Tensor rstd, Tensor? "
      "d_sum) -> "
      "(Tensor dx, Tensor d_added, Tensor d_factor)");
  m.def("has_product_rms_norm(Tensor x, int D) -> bool");
}

}  // namespace megalodon::ops
