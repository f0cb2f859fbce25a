#include "ops/product_swiglu/product_swiglu.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/product.h"
#include "ops/product_swiglu/kernel.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using Optional = std::optional<at::Tensor>;
using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of x [M, K] and results of F columns.
bool has_kernel(const at::Tensor& x, int64_t F) {
  if (!x.is_cuda() || !has_fast_kernel(x) || x.scalar_type() != at::kBFloat16 || x.dim() != 2) return false;
  if (x.numel() == 0 || F == 0 || (x.size(1) | F) % 64 != 0) return false;
  static const auto op = registered<bool(const at::Tensor&)>("megalodon::has_product_swiglu");
  return op.call(x);
}

// The kernel's [a, b] and y; one that is not wanted is undefined.
std::tuple<at::Tensor, at::Tensor> run_kernel(const at::Tensor& x, const at::Tensor& weight, bool factors,
                                              bool value) {
  using Call = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, bool, bool);
  static const auto call = registered<Call>("megalodon::product_swiglu");
  return call.call(x, weight, factors, value);
}

}  // namespace

SwigluProduct product_swiglu(const at::Tensor& x, const at::Tensor& weight, bool factors) {
  constexpr auto op = "product_swiglu";
  check_activation(op, "x", x, 2);
  check_type(op, "weight", weight, x.scalar_type());
  check_shape(op, "weight", weight, {-1, x.size(1)});
  TORCH_CHECK(weight.size(0) % 2 == 0, "[product_swiglu] weight: expected an even number of rows, got ",
              weight.size(0));
  if (!has_fast_kernel(x)) return product_swiglu_reference(x, weight);
  if (!has_kernel(x, weight.size(0) / 2)) {
    const auto both = product(x, weight.t()).chunk(2, 1);
    const auto y = swiglu(both[0], both[1]);
    return factors ? SwigluProduct{both[0], both[1], y} : SwigluProduct{{}, {}, y};
  }
  const auto [both, y] = run_kernel(x, weight, factors, true);
  if (!factors) return {{}, {}, y};
  const auto parts = both.chunk(2, 1);
  return {parts[0], parts[1], y};
}

at::Tensor tall_product(const at::Tensor& x, const at::Tensor& weight) {
  constexpr int64_t kManyRows = 8192;
  const int64_t N = weight.size(0);
  if (x.size(0) >= kManyRows && x.size(1) <= kMostResidentDepth && N % 2 == 0 && has_kernel(x, N / 2))
    return std::get<0>(run_kernel(x, weight, true, false));
  return product(x, weight.t());
}

SwigluGradients product_swiglu_gradients(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& a,
                                         const Optional& b, bool biased, bool value) {
  constexpr auto op = "product_swiglu_gradients";
  check_activation(op, "dy", dy, dy.dim() == 3 ? 3 : 2);
  check_type(op, "weight", weight, dy.scalar_type());
  check_type(op, "a", a, dy.scalar_type());
  if (dy.dim() == 3) {
    check_shape(op, "weight", weight, {dy.size(0), dy.size(2), -1});
    check_shape(op, "a", a, {dy.size(0), dy.size(1), weight.size(2)});
  } else {
    check_shape(op, "weight", weight, {dy.size(1), -1});
    check_shape(op, "a", a, {dy.size(0), weight.size(1)});
  }
  if (b) {
    check_type(op, "b", *b, a.scalar_type());
    check_shape(op, "b", *b, a.sizes());
  }
  if (!has_fast_kernel(dy)) return product_swiglu_gradients_reference(dy, weight, a, b, biased);
  if (!has_kernel(dy, weight.size(-1))) return swiglu_gradients(a, b, product(dy, weight), biased, value);
  using Call = Tensors4(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Optional&, bool, bool);
  static const auto call = registered<Call>("megalodon::product_swiglu_backward");
  const auto [da, db, y, d_bias] = call.call(dy, weight, a, b, value, biased);
  return {da, db, y, d_bias};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("product_swiglu(Tensor x, Tensor weight, bool factors, bool value) -> (Tensor both, Tensor y)");
  m.def(
      "product_swiglu_backward(Tensor dy, Tensor weight, Tensor a, Tensor? b, bool value, bool sums) -> "
      "(Tensor da, Tensor db, Tensor y, Tensor d_bias)");
  m.def("has_product_swiglu(Tensor x) -> bool");
}

}  // namespace megalodon::ops
