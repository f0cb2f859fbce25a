#include "ops/layer_norm/layer_norm.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/column_sums.h"
#include "ops/layer_norm/kernel.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensors3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Parameter = std::optional<at::Tensor>;

void check(const at::Tensor& x, const Parameter& weight, const Parameter& bias) {
  constexpr auto op = "layer_norm";
  check_activation(op, "x", x);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "[layer_norm] x: expected at least one feature, got shape ",
              x.sizes());
  TORCH_CHECK(weight.has_value() == bias.has_value(), "[layer_norm] bias: expected ",
              weight ? "a tensor, as weight is one, got none" : "none, as weight is none, got a tensor");
  if (!weight) return;
  for (const auto& [name, parameter] : {std::pair{"weight", *weight}, {"bias", *bias}}) {
    check_type(op, name, parameter, statistics_type(x));
    check_shape(op, name, parameter, {x.size(-1)});
  }
}

// y, and the mean and reciprocal deviation of each row.
Tensors3 forward_cpu(const at::Tensor& x, const Parameter& weight, const Parameter& bias, double eps) {
  const auto D = x.size(-1), rows = x.numel() / D;
  const auto x_ = x.contiguous(), y = at::empty_like(x_);
  const auto weight_ = weight ? weight->contiguous() : at::Tensor();
  const auto bias_ = bias ? bias->contiguous() : at::Tensor();
  const auto mean = at::empty({rows}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  with_element_type(x, [&]<class T>(T*) {
    cpu::layer_norm_forward(pointer<T>(x_), pointer<float>(weight_), pointer<float>(bias_),
                            static_cast<float>(eps), rows, D, mutable_pointer<T>(y),
                            mutable_pointer<float>(mean), mutable_pointer<float>(rstd));
  });
  return {y, mean, rstd};
}

Tensors3 backward_cpu(const at::Tensor& x, const Parameter& weight, const at::Tensor& mean,
                      const at::Tensor& rstd, const at::Tensor& dy) {
  const auto D = x.size(-1), rows = x.numel() / D;
  const auto x_ = x.contiguous(), dy_ = dy.contiguous(), dx = at::empty_like(x_);
  const auto weight_ = weight ? weight->contiguous() : at::Tensor();
  const auto sums = [&] {
    return weight ? at::empty({row_block_count(rows), D}, x.options().dtype(at::kDouble)) : at::Tensor();
  };
  const auto d_weight = sums(), d_bias = sums();
  with_element_type(x, [&]<class T>(T*) {
    cpu::layer_norm_backward(pointer<T>(x_), pointer<float>(weight_), pointer<float>(mean),
                             pointer<float>(rstd), pointer<T>(dy_), rows, D, mutable_pointer<T>(dx),
                             mutable_pointer<double>(d_weight), mutable_pointer<double>(d_bias));
  });
  if (!weight) return {dx, {}, {}};
  return {dx, d_weight.sum(0).to(at::kFloat), d_bias.sum(0).to(at::kFloat)};
}

at::Tensor infer_cpu(const at::Tensor& x, const Parameter& weight, const Parameter& bias, double eps) {
  check(x, weight, bias);
  if (!has_fast_kernel(x)) return layer_norm_reference(x, weight, bias, eps);
  return std::get<0>(forward_cpu(x, weight, bias, eps));
}

at::Tensor dispatch(const at::Tensor& x, const Parameter& weight, const Parameter& bias, double eps) {
  static const auto op = registered<decltype(infer_cpu)>("megalodon::layer_norm");
  return op.call(x, weight, bias, eps);
}

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const Parameter& weight,
                            const Parameter& bias, double eps) {
    static const auto op = registered<decltype(forward_cpu)>("megalodon::layer_norm_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, mean, rstd] = op.call(x, weight, bias, eps);
    ctx->save_for_backward({x, weight.value_or(at::Tensor()), mean, rstd});
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    static const auto op = registered<decltype(backward_cpu)>("megalodon::layer_norm_backward");
    const auto saved = ctx->get_saved_variables();
    const auto weight = saved[1].defined() ? Parameter(saved[1]) : std::nullopt;
    const auto [dx, d_weight, d_bias] = op.call(saved[0], weight, saved[2], saved[3], dy[0]);
    return {dx, d_weight, d_bias, {}};
  }
};

// float64 and devices without kernels are differentiated through the reference.
at::Tensor autograd(const at::Tensor& x, const Parameter& weight, const Parameter& bias, double eps) {
  check(x, weight, bias);
  if (!has_fast_kernel(x)) return layer_norm_reference(x, weight, bias, eps);
  if (needs_gradient({x, weight.value_or(at::Tensor()), bias.value_or(at::Tensor())}))
    return LayerNorm::apply(x, weight, bias, eps);
  const at::AutoDispatchBelowADInplaceOrView below;
  return dispatch(x, weight, bias, eps);
}

}  // namespace

at::Tensor layer_norm(const at::Tensor& x, const Parameter& weight, const Parameter& bias, double eps) {
  return dispatch(x, weight, bias, eps);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> Tensor");
  m.def(
      "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, "
      "Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor dy) -> "
      "(Tensor dx, Tensor d_weight, Tensor d_bias)");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("layer_norm", &infer_cpu);
  m.impl("layer_norm_forward", &forward_cpu);
  m.impl("layer_norm_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("layer_norm", &autograd);
}

}  // namespace megalodon::ops
