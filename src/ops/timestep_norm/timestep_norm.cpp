#include "ops/timestep_norm/timestep_norm.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>

#include "ops/check.h"
#include "ops/registered.h"
#include "ops/timestep_norm/kernel.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Mask = std::optional<at::Tensor>;
using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors5 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors6 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

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

// y, the state after, and the mean and reciprocal deviation of every step where `keep_steps`.
Tensors6 run_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                     const at::Tensor& count, const at::Tensor& mean, const at::Tensor& var,
                     const Mask& padding_mask, double eps, bool keep_steps) {
  const auto B = x.size(0), L = x.size(1), D = x.size(2), G = mean.size(1);
  const auto x_ = x.contiguous(), weight_ = weight.contiguous(), bias_ = bias.contiguous();
  const auto count_ = count.contiguous(), mean_ = mean.contiguous(), var_ = var.contiguous();
  const auto mask = padding_mask ? padding_mask->contiguous() : at::Tensor();
  const auto y = at::empty_like(x_), last_mean = at::empty_like(mean_), last_var = at::empty_like(var_);
  const auto steps = [&] { return keep_steps ? at::empty({B, L, G}, mean.options()) : at::Tensor(); };
  const auto step_mean = steps(), step_rstd = steps();
  with_element_type(x, [&]<class T>(T*) {
    cpu::timestep_norm_forward<T>({B, L, D, G}, {.x = pointer<T>(x_),
                                                 .weight = pointer<float>(weight_),
                                                 .bias = pointer<float>(bias_),
                                                 .count = pointer<int64_t>(count_),
                                                 .mean = pointer<float>(mean_),
                                                 .var = pointer<float>(var_),
                                                 .mask = pointer<uint8_t>(mask),
                                                 .eps = static_cast<float>(eps),
                                                 .y = mutable_pointer<T>(y),
                                                 .last_mean = mutable_pointer<float>(last_mean),
                                                 .last_var = mutable_pointer<float>(last_var),
                                                 .step_mean = mutable_pointer<float>(step_mean),
                                                 .step_rstd = mutable_pointer<float>(step_rstd)});
  });
  const auto last_count = padding_mask ? count + padding_mask->eq(0).sum(1) : count + L;
  return {y, last_count, last_mean, last_var, step_mean, step_rstd};
}

Tensors4 infer_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                   const at::Tensor& count, const at::Tensor& mean, const at::Tensor& var,
                   const Mask& padding_mask, double eps) {
  check(x, weight, bias, count, mean, var, padding_mask);
  if (!has_fast_kernel(x)) {
    const auto [y, state] = timestep_norm_reference(x, weight, bias, {count, mean, var}, padding_mask, eps);
    return {y, state.count, state.mean, state.var};
  }
  const auto [y, last_count, last_mean, last_var, step_mean, step_rstd] =
      run_forward(x, weight, bias, count, mean, var, padding_mask, eps, false);
  return {y, last_count, last_mean, last_var};
}

Tensors6 forward_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                     const at::Tensor& count, const at::Tensor& mean, const at::Tensor& var,
                     const Mask& padding_mask, double eps) {
  return run_forward(x, weight, bias, count, mean, var, padding_mask, eps, true);
}

Tensors5 backward_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& last_count,
                      const Mask& padding_mask, const at::Tensor& step_mean, const at::Tensor& step_rstd,
                      const at::Tensor& dy, const std::optional<at::Tensor>& d_last_mean,
                      const std::optional<at::Tensor>& d_last_var, at::TensorList added) {
  const auto B = x.size(0), L = x.size(1), D = x.size(2), G = step_mean.size(2);
  const auto x_ = x.contiguous(), weight_ = weight.contiguous(), dy_ = dy.contiguous();
  const auto count_ = last_count.contiguous();
  const auto of_state = [&](const std::optional<at::Tensor>& d) {
    return d ? d->contiguous() : at::zeros({B, G}, step_mean.options());
  };
  const auto d_last_mean_ = of_state(d_last_mean), d_last_var_ = of_state(d_last_var);
  const auto mask = padding_mask ? padding_mask->contiguous() : at::Tensor();
  const auto dx = at::empty_like(x_), d_mean = at::empty_like(d_last_mean_), d_var = at::empty_like(d_mean);
  const auto d_weight = at::empty({B, D}, x.options().dtype(at::kDouble)), d_bias = at::empty_like(d_weight);
  with_element_type(x, [&]<class T>(T*) {
    cpu::timestep_norm_backward<T>({B, L, D, G}, {.x = pointer<T>(x_),
                                                  .dy = pointer<T>(dy_),
                                                  .weight = pointer<float>(weight_),
                                                  .last_count = pointer<int64_t>(count_),
                                                  .mask = pointer<uint8_t>(mask),
                                                  .step_mean = pointer<float>(step_mean),
                                                  .step_rstd = pointer<float>(step_rstd),
                                                  .d_last_mean = pointer<float>(d_last_mean_),
                                                  .d_last_var = pointer<float>(d_last_var_),
                                                  .dx = mutable_pointer<T>(dx),
                                                  .d_weight = mutable_pointer<double>(d_weight),
                                                  .d_bias = mutable_pointer<double>(d_bias),
                                                  .d_mean = mutable_pointer<float>(d_mean),
                                                  .d_var = mutable_pointer<float>(d_var)});
  });
  for (const auto& d : added) dx.add_(d);
  return {dx, d_weight.sum(0).to(at::kFloat), d_bias.sum(0).to(at::kFloat), d_mean, d_var};
}

Tensors4 dispatch(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                  const at::Tensor& count, const at::Tensor& mean, const at::Tensor& var,
                  const Mask& padding_mask, double eps) {
  static const auto op = registered<decltype(infer_cpu)>("megalodon::timestep_norm");
  return op.call(x, weight, bias, count, mean, var, padding_mask, eps);
}

// The results are y, the state after and, where x passes, x twice.
struct TimestepNorm : torch::autograd::Function<TimestepNorm> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& bias, const at::Tensor& count, const at::Tensor& mean,
                               const at::Tensor& var, const Mask& padding_mask, double eps, bool passes) {
    static const auto op = registered<decltype(forward_cpu)>("megalodon::timestep_norm_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, last_count, last_mean, last_var, step_mean, step_rstd] =
        op.call(x, weight, bias, count, mean, var, padding_mask, eps);
    ctx->save_for_backward(
        {x, weight, padding_mask.value_or(at::Tensor()), last_count, step_mean, step_rstd});
    ctx->mark_non_differentiable({last_count});
    ctx->set_materialize_grads(false);
    if (passes) return {y, last_count, last_mean, last_var, x, x};
    return {y, last_count, last_mean, last_var};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    static const auto op = registered<decltype(backward_cpu)>("megalodon::timestep_norm_backward");
    const auto saved = ctx->get_saved_variables();
    const auto given = [](const at::Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; };
    variable_list added;
    std::copy_if(upstream.begin() + 4, upstream.end(), std::back_inserter(added),
                 [](const auto& d) { return d.defined(); });
    const auto dy = upstream[0].defined() ? upstream[0] : at::zeros_like(saved[0]);
    const auto [dx, d_weight, d_bias, d_mean, d_var] =
        op.call(saved[0], saved[1], saved[3], given(saved[2]), saved[4], saved[5], dy, given(upstream[2]),
                given(upstream[3]), added);
    return {dx, d_weight, d_bias, {}, d_mean, d_var, {}, {}, {}};
  }
};

// float64 and devices without kernels are differentiated through the reference.
Tensors4 autograd(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                  const at::Tensor& count, const at::Tensor& mean, const at::Tensor& var,
                  const Mask& padding_mask, double eps) {
  check(x, weight, bias, count, mean, var, padding_mask);
  if (!has_fast_kernel(x)) {
    const auto [y, state] = timestep_norm_reference(x, weight, bias, {count, mean, var}, padding_mask, eps);
    return {y, state.count, state.mean, state.var};
  }
  if (needs_gradient({x, weight, bias, mean, var})) {
    const auto out = TimestepNorm::apply(x, weight, bias, count, mean, var, padding_mask, eps, false);
    return {out[0], out[1], out[2], out[3]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return dispatch(x, weight, bias, count, mean, var, padding_mask, eps);
}

}  // namespace

TimestepNormResult timestep_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                 const TimestepNormState& state, const Mask& padding_mask, double eps) {
  const auto [y, count, mean, var] =
      dispatch(x, weight, bias, state.count, state.mean, state.var, padding_mask, eps);
  return {y, {count, mean, var}};
}

std::tuple<TimestepNormResult, at::Tensor, at::Tensor> timestep_norm_and_pass(const at::Tensor& x,
                                                                              const at::Tensor& weight,
                                                                              const at::Tensor& bias,
                                                                              const TimestepNormState& state,
                                                                              double eps) {
  const auto& [count, mean, var] = state;
  if (!has_fast_kernel(x) || !needs_gradient({x, weight, bias, mean, var}))
    return {timestep_norm(x, weight, bias, state, {}, eps), x, x};
  check(x, weight, bias, count, mean, var, {});
  const auto out = TimestepNorm::apply(x, weight, bias, count, mean, var, Mask(), eps, true);
  return {TimestepNormResult{out[0], {out[1], out[2], out[3]}}, out[4], out[5]};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def(
      "timestep_norm(Tensor x, Tensor weight, Tensor bias, Tensor count, Tensor mean, Tensor var, "
      "Tensor? padding_mask=None, float eps=1e-05) -> (Tensor y, Tensor count, Tensor mean, Tensor var)");
  m.def(
      "timestep_norm_forward(Tensor x, Tensor weight, Tensor bias, Tensor count, Tensor mean, Tensor var, "
      "Tensor? padding_mask, float eps) -> (Tensor y, Tensor count, Tensor mean, Tensor var, "
      "Tensor step_mean, Tensor step_rstd)");
  m.def(
      "timestep_norm_backward(Tensor x, Tensor weight, Tensor last_count, Tensor? padding_mask, "
      "Tensor step_mean, Tensor step_rstd, Tensor dy, Tensor? d_last_mean, Tensor? d_last_var, "
      "Tensor[] added) -> "
      "(Tensor dx, Tensor d_weight, Tensor d_bias, Tensor d_mean, Tensor d_var)");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("timestep_norm", &infer_cpu);
  m.impl("timestep_norm_forward", &forward_cpu);
  m.impl("timestep_norm_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("timestep_norm", &autograd);
}

}  // namespace megalodon::ops
