#include "ops/float8/float8.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/device.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {

bool is_float8(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat8_e4m3fn || x.scalar_type() == at::kFloat8_e5m2;
}

}  // namespace

Float8 to_float8(const at::Tensor& x, at::ScalarType type, bool rows, bool columns) {
  check_activation("to_float8", "x", x, 2);
  TORCH_CHECK(type == at::kFloat8_e4m3fn || type == at::kFloat8_e5m2,
              "[to_float8] type: expected Float8_e4m3fn or Float8_e5m2, got ", type);
  if (!x.is_cuda()) return to_float8_reference(x, type, rows, columns);
  check_type("to_float8", "x", x, at::kBFloat16);
  using Call = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, at::ScalarType, bool, bool);
  static const auto op = registered<Call>("megalodon::to_float8");
  const auto [of_rows, of_columns, scale] = op.call(x, type, rows, columns);
  return {of_rows, of_columns, scale};
}

at::Tensor float8_product(const at::Tensor& a, const at::Tensor& a_scale, const at::Tensor& b,
                          const at::Tensor& b_scale, const Float8ProductOptions& o) {
  constexpr auto name = "float8_product";
  for (const auto& [argument, x] : {std::pair{"a", a}, {"b", b}})
    TORCH_CHECK(x.dim() == 2 && is_float8(x), "[float8_product] ", argument,
                ": expected a matrix of float8, got ", x.scalar_type(), " ", x.sizes());
  check_shape(name, "b", b, {-1, a.size(1)});
  if (o.bias) check_shape(name, "bias", *o.bias, {b.size(0)});
  if (o.added) {
    check_shape(name, "added", *o.added, {a.size(0), b.size(0)});
    check_type(name, "added", *o.added, o.type);
  }
  if (!a.is_cuda()) return float8_product_reference(a, a_scale, b, b_scale, o);
  TORCH_CHECK(suits_float8(a, a.size(0), b.size(0), a.size(1)),
              "[float8_product] a: expected sizes in multiples of 16, got ", a.sizes(), " and ", b.sizes());
  using Call =
      at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, at::ScalarType,
                 bool, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&);
  static const auto op = registered<Call>("megalodon::float8_product");
  return op.call(a, a_scale, b, b_scale, o.type, o.fast_sums, o.bias, o.added);
}

bool suits_float8(const at::Tensor& x, int64_t M, int64_t N, int64_t K) {
  return (M | N | K) % 16 == 0 && M * N * K > 0 && (x.is_cpu() || has_float8_units(x));
}

bool has_float8_units(const at::Tensor& x) {
  if (!x.is_cuda() || !has_cuda_kernels()) return false;
  static const auto op = registered<bool(const at::Tensor&)>("megalodon::has_float8_units");
  return op.call(x);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "to_float8(Tensor x, ScalarType type, bool rows, bool columns) -> (Tensor rows, Tensor columns, Tensor "
      "scale)");
  m.def(
      "float8_product(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType type, bool fast_sums, "
      "Tensor? bias, Tensor? added) -> Tensor");
  m.def("has_float8_units(Tensor x) -> bool");
}

}  // namespace megalodon::ops
