#include "ops/product.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/simd_dispatch.h"

namespace megalodon::ops {
namespace {

// y = x w^T + bias, x [M, K], w [N, K].
using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                          std::string_view, c10::List<std::optional<at::Scalar>>,
                          std::optional<std::string_view>);

const std::optional<c10::TypedOperatorHandle<Linear>>& onednn_linear() {
  static const auto op = [] {
    const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    return found ? std::optional(found->typed<Linear>()) : std::nullopt;
  }();
  return op;
}

// Smaller products are done before oneDNN has begun.
constexpr int64_t kWorthIt = 1 << 20;

bool is_for_onednn(const at::Tensor& a, const at::Tensor& b) {
  static const bool is_faster = mkl_takes_avx2() && has_onednn_product();
  return is_faster && a.is_cpu() && a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
         a.size(-2) * a.size(-1) * b.size(-1) >= kWorthIt &&
         !(at::GradMode::is_enabled() && (a.requires_grad() || b.requires_grad()));
}

at::Tensor onednn_products(const at::Tensor& a, const at::Tensor& b) {
  auto y = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  for (int64_t s = 0; s < a.size(0); ++s) y[s].copy_(onednn_product(a[s], b[s]));
  return y;
}

}  // namespace

bool has_onednn_product() {
  return onednn_linear().has_value();
}

at::Tensor onednn_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias) {
  TORCH_CHECK(has_onednn_product(), "onednn_product: this torch has no mkldnn::_linear_pointwise");
  const auto linear = [&](const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& added) {
    return onednn_linear()->call(x, w, added, "none", c10::List<std::optional<at::Scalar>>(), "");
  };
  // The left side is copied unless its rows lie in memory: then rather the smaller of both.
  if (!bias.defined() && !a.is_contiguous() && b.size(1) < a.size(0))
    return linear(b.t(), a, std::nullopt).t().contiguous();
  return linear(a, b.t(), bias.defined() ? std::optional(bias) : std::nullopt);
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  const bool stacked = a.dim() == 3;
  if (is_for_onednn(a, b)) return stacked ? onednn_products(a, b) : onednn_product(a, b);
  return stacked ? at::bmm(a, b) : at::mm(a, b);
}

at::Tensor product_with_bias(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias) {
  return is_for_onednn(a, b) ? onednn_product(a, b, bias) : at::addmm(bias, a, b);
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  if (type == a.scalar_type() || !a.is_cuda()) return product(a, b).to(type);
  return a.dim() == 3 ? at::bmm(a, b, type) : at::mm(a, b, type);
}

void put_product(at::Tensor to, const at::Tensor& a, const at::Tensor& b) {
  if (is_for_onednn(a, b))
    to.copy_(onednn_product(a, b));
  else
    at::mm_out(to, a, b);
}

void add_product(at::Tensor sum, const at::Tensor& a, const at::Tensor& b) {
  const auto type = sum.scalar_type();
  if (a.is_cpu() && (type != a.scalar_type() || is_for_onednn(a, b))) {
    sum.add_(product(a, b));
  } else if (type == a.scalar_type()) {
    a.dim() == 3 ? sum.baddbmm_(a, b) : sum.addmm_(a, b);
  } else {
    a.dim() == 3 ? at::baddbmm_out(sum, sum, a, b, type) : at::addmm_out(sum, sum, a, b, type);
  }
}

}  // namespace megalodon::ops
