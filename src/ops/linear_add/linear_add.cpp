#include "ops/linear_add/linear_add.h"

#include <ATen/ATen.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {

at::Tensor linear_add(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& added) {
  constexpr auto op = "linear_add";
  check_activation(op, "x", x, x.dim() == 3 ? 3 : 2);
  check_type(op, "weight", weight, x.scalar_type());
  check_type(op, "added", added, x.scalar_type());
  if (x.dim() == 3) {
    check_shape(op, "weight", weight, {x.size(0), -1, x.size(2)});
    check_shape(op, "added", added, {x.size(0), x.size(1), weight.size(1)});
  } else {
    check_shape(op, "weight", weight, {-1, x.size(1)});
    check_shape(op, "added", added, {x.size(0), weight.size(0)});
  }
  const bool has_kernel = x.is_cuda() && has_fast_kernel(x) && x.scalar_type() == at::kBFloat16 &&
                          x.dim() == 2 && x.numel() > 0 && added.numel() > 0;
  if (!has_kernel) return linear_add_reference(x, weight, added);
  using Call = void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                    const std::optional<at::Tensor>&);
  static const auto product_into = registered<Call>("megalodon::product_into");
  const auto added_ = added.contiguous(), y = at::empty_like(added_);
  product_into.call(y, x.contiguous(), weight.contiguous().t(), {}, added_);
  return y;
}

}  // namespace megalodon::ops
