#include "ops/cema_coefficients/cema_coefficients.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensor = at::Tensor;
using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                   const Tensor&);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                            const Tensor&, const Tensor&, const Tensor&);

void check(const Tensor& alpha, const Tensor& delta, const Tensor& theta, const Tensor& gamma) {
  constexpr auto op = "cema_coefficients";
  TORCH_CHECK(alpha.scalar_type() == at::kFloat || alpha.scalar_type() == at::kDouble,
              "[cema_coefficients] alpha: expected Float or Double, got ", alpha.scalar_type());
  check_shape(op, "alpha", alpha, {-1, -1});
  const auto D = alpha.size(0), N = alpha.size(1);
  TORCH_CHECK(N >= 1, "[cema_coefficients] alpha: expected at least one component a feature, got shape ",
              alpha.sizes());
  check_shape(op, "delta", delta, {D, N});
  check_shape(op, "theta", theta, {D});
  check_shape(op, "gamma", gamma, {D, N, 2});
  for (const auto& [name, x] : {std::pair{"delta", delta}, {"theta", theta}, {"gamma", gamma}}) {
    check_type(op, name, x, alpha.scalar_type());
    TORCH_CHECK(x.device() == alpha.device(), "[cema_coefficients] ", name, ": expected device ",
                alpha.device(), ", got ", x.device());
  }
}

struct Coefficients : torch::autograd::Function<Coefficients> {
  static variable_list forward(AutogradContext* ctx, const Tensor& alpha, const Tensor& delta,
                               const Tensor& theta, const Tensor& gamma) {
    static const auto op = registered<Forward>("megalodon::cema_coefficients");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({alpha, delta, theta});
    const auto [p, q, eta] = op.call(alpha, delta, theta, gamma);
    return {p, q, eta};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    static const auto op = registered<Backward>("megalodon::cema_coefficients_backward");
    const auto saved = ctx->get_saved_variables();
    const auto [d_alpha, d_delta, d_theta, d_gamma] =
        op.call(saved[0], saved[1], saved[2], upstream[0], upstream[1], upstream[2]);
    return {d_alpha, d_delta, d_theta, d_gamma};
  }
};

}  // namespace

CemaCoefficients cema_coefficients(const Tensor& alpha, const Tensor& delta, const Tensor& theta,
                                   const Tensor& gamma) {
  check(alpha, delta, theta, gamma);
  if (!alpha.is_cuda() || !has_fast_kernel(alpha))
    return cema_coefficients_reference(alpha, delta, theta, gamma);
  const auto results = Coefficients::apply(alpha, delta, theta, gamma);
  return {results[0], results[1], results[2]};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "cema_coefficients(Tensor alpha, Tensor delta, Tensor theta, Tensor gamma) -> (Tensor p, Tensor q, "
      "Tensor eta)");
  m.def(
      "cema_coefficients_backward(Tensor alpha, Tensor delta, Tensor theta, Tensor dp, Tensor dq, Tensor "
      "deta) -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace megalodon::ops
