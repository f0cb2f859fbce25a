#include "ops/rms_norm/rms_norm.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/column_sums.h"
#include "ops/registered.h"
#include "ops/rms_norm/kernel.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Parameter = std::optional<at::Tensor>;
using Tensors2 = std::tuple<at::Tensor, at::Tensor>;

void check(const at::Tensor& x, const Parameter& weight) {
  check_activation("rms_norm", "x", x);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "[rms_norm] x: expected at least one feature, got shape ",
              x.sizes());
  if (!weight) return;
  check_type("rms_norm", "weight", *weight, statistics_type(x));
  if (weight->dim() == 1) return check_shape("rms_norm", "weight", *weight, {x.size(-1)});
  check_shape("rms_norm", "weight", *weight, {-1, x.size(-1)});
  const auto K = weight->size(0), rows = x.numel() / x.size(-1);
  TORCH_CHECK(K >= 1 && rows % K == 0, "[rms_norm] weight: expected a number of weights that divides the ",
              rows, " rows of x, got ", K);
}

int64_t weight_count(const Parameter& weight) {
  return weight && weight->dim() == 2 ? weight->size(0) : 1;
}

// y, and 1/sqrt(mean(x^2) + eps) of each row.
Tensors2 forward_cpu(const at::Tensor& x, const Parameter& weight, double eps) {
  const auto D = x.size(-1), rows = x.numel() / D, K = weight_count(weight), each = rows / K;
  const auto x_ = x.contiguous(), weight_ = weight ? weight->contiguous() : at::Tensor();
  const auto y = at::empty_like(x_), rstd = at::empty({rows}, x.options().dtype(at::kFloat));
  with_element_type(x, [&]<class T>(T*) {
    for (int64_t k = 0, at = 0; k < K; ++k, at += each) {
      cpu::rms_norm_forward(pointer<T>(x_) + at * D, weight ? pointer<float>(weight_) + k * D : nullptr,
                            static_cast<float>(eps), each, D, mutable_pointer<T>(y) + at * D,
                            mutable_pointer<float>(rstd) + at);
    }
  });
  return {y, rstd};
}

Tensors2 backward_cpu(const at::Tensor& x, const Parameter& weight, const at::Tensor& rstd,
                      const at::Tensor& dy) {
  const auto D = x.size(-1), rows = x.numel() / D, K = weight_count(weight), each = rows / K;
  const auto blocks = row_block_count(each);
  const auto x_ = x.contiguous(), dy_ = dy.contiguous(), dx = at::empty_like(x_);
  const auto weight_ = weight ? weight->contiguous() : at::Tensor();
  const auto d_weight = weight ? at::empty({K, blocks, D}, x.options().dtype(at::kDouble)) : at::Tensor();
  with_element_type(x, [&]<class T>(T*) {
    for (int64_t k = 0, at = 0; k < K; ++k, at += each) {
      cpu::rms_norm_backward(pointer<T>(x_) + at * D, weight ? pointer<float>(weight_) + k * D : nullptr,
                             pointer<float>(rstd) + at, pointer<T>(dy_) + at * D, each, D,
                             mutable_pointer<T>(dx) + at * D,
                             weight ? mutable_pointer<double>(d_weight) + k * blocks * D : nullptr);
    }
  });
  return {dx, weight ? d_weight.sum(1).view(weight->sizes()).to(at::kFloat) : at::Tensor()};
}

at::Tensor infer_cpu(const at::Tensor& x, const Parameter& weight, double eps) {
  check(x, weight);
  return has_fast_kernel(x) ? std::get<0>(forward_cpu(x, weight, eps)) : rms_norm_reference(x, weight, eps);
}

at::Tensor dispatch(const at::Tensor& x, const Parameter& weight, double eps) {
  static const auto op = registered<decltype(infer_cpu)>("megalodon::rms_norm");
  return op.call(x, weight, eps);
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const Parameter& weight, double eps) {
    static const auto op = registered<decltype(forward_cpu)>("megalodon::rms_norm_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, rstd] = op.call(x, weight, eps);
    ctx->save_for_backward({x, weight.value_or(at::Tensor()), rstd});
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    static const auto op = registered<decltype(backward_cpu)>("megalodon::rms_norm_backward");
    const auto saved = ctx->get_saved_variables();
    const auto weight = saved[1].defined() ? Parameter(saved[1]) : std::nullopt;
    const auto [dx, d_weight] = op.call(saved[0], weight, saved[2], dy[0]);
    return {dx, d_weight, {}};
  }
};

// float64 and devices without kernels are differentiated through the reference.
at::Tensor autograd(const at::Tensor& x, const Parameter& weight, double eps) {
  check(x, weight);
  if (!has_fast_kernel(x)) return rms_norm_reference(x, weight, eps);
  if (needs_gradient({x, weight.value_or(at::Tensor())})) return RmsNorm::apply(x, weight, eps);
  const at::AutoDispatchBelowADInplaceOrView below;
  return dispatch(x, weight, eps);
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const Parameter& weight, double eps) {
  return dispatch(x, weight, eps);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("rms_norm(Tensor x, Tensor? weight=None, float eps=1e-05) -> Tensor");
  m.def("rms_norm_forward(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor x, Tensor? weight, Tensor rstd, Tensor dy) -> (Tensor dx, Tensor d_weight)");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("rms_norm", &infer_cpu);
  m.impl("rms_norm_forward", &forward_cpu);
  m.impl("rms_norm_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("rms_norm", &autograd);
}

}  // namespace megalodon::ops
