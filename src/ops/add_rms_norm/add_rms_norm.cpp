#include "ops/add_rms_norm/add_rms_norm.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& x, const Optional& added, const at::Tensor& factor, at::ScalarType type) {
  constexpr auto op = "add_rms_norm";
  check_type(op, "x", x, statistics_type(x));
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "[add_rms_norm] x: expected at least one feature, got shape ",
              x.sizes());
  if (added) {
    check_type(op, "added", *added, type);
    check_shape(op, "added", *added, x.sizes());
  }
  check_type(op, "factor", factor, x.scalar_type());
  if (factor.dim() == 1) return check_shape(op, "factor", factor, {x.size(-1)});
  check_shape(op, "factor", factor, {-1, x.size(-1)});
  const auto K = factor.size(0), rows = x.numel() / x.size(-1);
  TORCH_CHECK(K >= 1 && rows % K == 0, "[add_rms_norm] factor: expected a number that divides the ", rows,
              " rows of x, got ", K);
}

// Kernels there are for GPUs, of rows that fit their registers; the operators one by one serve elsewhere.
bool has_kernel(const at::Tensor& x) {
  const auto D = x.size(-1);
  return x.is_cuda() && has_fast_kernel(x) && D <= (D % 4 == 0 ? 8192 : 2048);
}

struct Function : torch::autograd::Function<Function> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& /*x*/, const Optional& added,
                               const at::Tensor& factor, const Triple& made) {
    const auto& [sum, normal, rstd] = made;
    ctx->save_for_backward({sum, factor, rstd});
    ctx->saved_data["added"] = added.has_value();
    ctx->set_materialize_grads(false);
    return {sum, normal};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d) {
    using Backward = Triple(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Optional&,
                            const at::Tensor&, bool);
    static const auto op = registered<Backward>("megalodon::add_rms_norm_backward");
    const auto saved = ctx->get_saved_variables();
    const bool added = ctx->saved_data["added"].toBool();
    if (!d[1].defined()) return {d[0], added ? d[0] : at::Tensor(), {}, {}};
    const auto d_sum = d[0].defined() ? Optional(d[0]) : std::nullopt;
    const auto [dx, d_added, d_factor] = op.call(saved[0], saved[1], saved[2], d_sum, d[1], added);
    return {dx, d_added, d_factor, {}};
  }
};

}  // namespace

Triple add_rms_norm_forward(const at::Tensor& x, const Optional& added, const at::Tensor& factor, double eps,
                            at::ScalarType type) {
  using Forward = Triple(const at::Tensor&, const Optional&, const at::Tensor&, double, at::ScalarType);
  static const auto op = registered<Forward>("megalodon::add_rms_norm_forward");
  auto [sum, normal, rstd] = op.call(x, added, factor, eps, type);
  return {added ? sum : x, normal, rstd};
}

AddRmsNorm add_rms_norm(const at::Tensor& x, const Optional& added, const at::Tensor& factor, double eps,
                        at::ScalarType type) {
  check(x, added, factor, type);
  if (!has_kernel(x)) return add_rms_norm_reference(x, added, factor, eps, type);
  const auto made = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return add_rms_norm_forward(x, added, factor, eps, type);
  };
  return add_rms_norm_results(x, added, factor, made());
}

AddRmsNorm add_rms_norm_results(const at::Tensor& x, const Optional& added, const at::Tensor& factor,
                                const Triple& made) {
  const auto& [sum, normal, rstd] = made;
  if (!needs_gradient({x, added.value_or(at::Tensor()), factor})) return {sum, normal};
  const auto both = Function::apply(x, added, factor, made);
  return {both[0], both[1]};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "add_rms_norm_forward(Tensor x, Tensor? added, Tensor factor, float eps, ScalarType type) -> "
      "(Tensor sum, Tensor normal, Tensor rstd)");
  m.def(
      "add_rms_norm_backward(Tensor sum, Tensor factor, Tensor rstd, Tensor? d_sum, Tensor d_normal, bool "
      "added) "
      "-> (Tensor dx, Tensor d_added, Tensor d_factor)");
}

}  // namespace megalodon::ops
