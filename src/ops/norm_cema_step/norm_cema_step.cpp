#include "ops/norm_cema_step/norm_cema_step.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/norm_cema_step/kernel.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using Kernel = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor& x, const at::Tensor& weight,
                                                              const at::Tensor& bias, double eps,
                                                              const at::Tensor& p, const at::Tensor& q,
                                                              const at::Tensor& eta, const at::Tensor& omega,
                                                              const at::Tensor& count, at::Tensor& mean,
                                                              at::Tensor& var, at::Tensor& h, bool early);

void check(const at::Tensor& x, const NormCemaParameters& p, const TimestepNormState& state,
           const at::Tensor& h) {
  constexpr auto op = "norm_cema_step";
  check_activation(op, "x", x, 3);
  const int64_t B = x.size(0), D = x.size(2);
  check_shape(op, "x", x, {B, 1, D});
  check_shape(op, "p", p.p, {D, -1});
  const int64_t N = p.p.size(1);
  const auto real = statistics_type(x), complex = at::toComplexType(real);
  const auto check_one = [&](const char* name, const at::Tensor& t, at::IntArrayRef shape,
                             at::ScalarType type) {
    check_shape(op, name, t, shape);
    check_type(op, name, t, type);
  };
  check_one("weight", p.weight, {D}, real);
  check_one("bias", p.bias, {D}, real);
  check_one("q", p.q, {D, N}, complex);
  check_one("eta", p.eta, {D, N}, complex);
  check_one("omega", p.omega, {D}, real);
  check_one("state.count", state.count, {B}, at::kLong);
  check_one("state.mean", state.mean, {B, -1}, real);
  const int64_t G = state.mean.size(1);
  TORCH_CHECK(G >= 1 && D % G == 0,
              "[norm_cema_step] state.mean: expected a number of groups that divides D = ", D, ", got ", G);
  check_one("state.var", state.var, {B, G}, real);
  check_one("h", h, {B, D, N, 2}, real);
  for (const auto& [name, t] : {std::pair{"state.mean", state.mean}, {"state.var", state.var}, {"h", h}})
    TORCH_CHECK(t.is_contiguous(), "[norm_cema_step] ", name, ": expected a contiguous tensor");
}

bool has_kernel(const at::Tensor& x, int64_t groups, int64_t components) {
  const int64_t features = x.size(2) / groups;
  return !at::GradMode::is_enabled() && x.is_cuda() && has_fast_kernel(x) && components % 4 == 0 &&
         components <= kMostStepComponents && features >= 2 && features * components <= kMostGroupComponents;
}

}  // namespace

NormCemaResult norm_cema_step(const at::Tensor& x, const NormCemaParameters& p,
                              const TimestepNormState& state, const at::Tensor& h) {
  static const auto op = registered<Kernel>("megalodon::norm_cema_step");
  check(x, p, state, h);
  if (!has_kernel(x, state.mean.size(1), p.p.size(1))) return norm_cema_step_reference(x, p, state, h);
  auto mean = state.mean, var = state.var, h_ = h;
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto [normal, y, count] =
      op.call(x, p.weight, p.bias, p.eps, p.p, p.q, p.eta, p.omega, state.count, mean, var, h_, p.early);
  return {normal, y, count};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "norm_cema_step(Tensor x, Tensor weight, Tensor bias, float eps, Tensor p, Tensor q, Tensor eta, "
      "Tensor omega, Tensor count, Tensor(a!) mean, Tensor(b!) var, Tensor(c!) h, bool early) -> "
      "(Tensor normal, Tensor y, Tensor count)");
}

}  // namespace megalodon::ops
