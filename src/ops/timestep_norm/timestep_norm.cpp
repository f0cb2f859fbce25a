#include "ops/timestep_norm/timestep_norm.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"

namespace megalodon::ops {
namespace {
using Mask = std::optional<at::Tensor>;

void check_counts(const at::Tensor& count, int64_t least, const char* reason) {
  const auto lowest = count.min();
  TORCH_CHECK(lowest.item<int64_t>() >= least, "[timestep_norm] state.count: expected at least ", least,
              reason, ", got ", lowest.item<int64_t>());
}

void check(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& count,
           const at::Tensor& mean, const at::Tensor& var, const Mask& padding_mask) {
  constexpr auto op = "timestep_norm";
  check_activation(op, "x", x, 3);
  const auto B = x.size(0), L = x.size(1), D = x.size(2);
  TORCH_CHECK(B >= 1 && L >= 1, "[timestep_norm] x: expected at least one sequence and one step, got shape ",
              x.sizes());
  for (const auto& [name, parameter] : {std::pair{"weight", weight}, {"bias", bias}}) {
    check_type(op, name, parameter, statistics_type(x));
    check_shape(op, name, parameter, {D});
  }
  check_type(op, "state.count", count, at::kLong);
  check_shape(op, "state.count", count, {B});
  check_type(op, "state.mean", mean, statistics_type(x));
  check_shape(op, "state.mean", mean, {B, -1});
  const auto G = mean.size(1);
  TORCH_CHECK(G >= 1 && D % G == 0,
              "[timestep_norm] state.mean: expected a number of groups that divides D = ", D, ", got ", G);
  check_type(op, "state.var", var, statistics_type(x));
  check_shape(op, "state.var", var, {B, G});
  if (G == D) {
    check_counts(count, 2, " where every feature is a group (one value has no variance)");
  } else if (count.is_cpu()) {
    check_counts(count, 0, "");
  }
  if (!padding_mask) return;
  TORCH_CHECK(padding_mask->scalar_type() == at::kBool || padding_mask->scalar_type() == at::kByte,
              "[timestep_norm] padding_mask: expected bool or uint8, got ", padding_mask->scalar_type());
  check_shape(op, "padding_mask", *padding_mask, {B, L});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> composite(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& count,
    const at::Tensor& mean, const at::Tensor& var, const Mask& padding_mask, double eps) {
  check(x, weight, bias, count, mean, var, padding_mask);
  const auto [y, state] = timestep_norm_reference(x, weight, bias, {count, mean, var}, padding_mask, eps);
  return {y, state.count, state.mean, state.var};
}

}  // namespace

TimestepNormResult timestep_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                 const TimestepNormState& state, const Mask& padding_mask, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("megalodon::timestep_norm", "")
                             .typed<decltype(composite)>();
  const auto [y, count, mean, var] =
      op.call(x, weight, bias, state.count, state.mean, state.var, padding_mask, eps);
  return {y, {count, mean, var}};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "timestep_norm(Tensor x, Tensor weight, Tensor bias, Tensor count, Tensor mean, Tensor var, "
      "Tensor? padding_mask=None, float eps=1e-05) -> (Tensor y, Tensor count, Tensor mean, Tensor var)");
}
TORCH_LIBRARY_IMPL(megalodon, CompositeImplicitAutograd, m) {
  m.impl("timestep_norm", &composite);
}

}  // namespace megalodon::ops
