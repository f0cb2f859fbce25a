#include "ops/swiglu/swiglu.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/column_sum/column_sum.h"
#include "ops/registered.h"
#include "ops/swiglu/kernel.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Optional = std::optional<at::Tensor>;
using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& a, const Optional& b, const Optional& bias = {}) {
  check_activation("swiglu", "a", a);
  if (bias) {
    TORCH_CHECK(a.dim() >= 1, "[swiglu] a: expected rows beside a bias, got a number");
    check_type("swiglu", "bias", *bias, statistics_type(a));
    check_shape("swiglu", "bias", *bias, {a.size(-1)});
  }
  if (!b) return;
  check_type("swiglu", "b", *b, a.scalar_type());
  check_shape("swiglu", "b", *b, a.sizes());
}

at::Tensor forward_cpu(const at::Tensor& a, const Optional& b) {
  check(a, b);
  if (!has_fast_kernel(a)) return swiglu_reference(a, b);
  const auto a_ = a.contiguous(), b_ = b ? b->contiguous() : at::Tensor();
  auto y = at::empty_like(a_);
  with_element_type(a, [&]<class T>(T*) {
    cpu::swiglu_forward(pointer<T>(a_), pointer<T>(b_), mutable_pointer<T>(y), a_.numel());
  });
  return y;
}

// da, db, y again where `value` asks for it, and da summed over the rows where `sums` does.
Tensors4 backward_cpu(const at::Tensor& a, const Optional& b, const at::Tensor& dy, bool value, bool sums) {
  const auto a_ = a.contiguous(), b_ = b ? b->contiguous() : at::Tensor(), dy_ = dy.contiguous();
  auto da = at::empty_like(a_), db = b ? at::empty_like(b_) : at::Tensor(),
       y = value ? at::empty_like(a_) : at::Tensor();
  with_element_type(a, [&]<class T>(T*) {
    cpu::swiglu_backward(pointer<T>(a_), pointer<T>(b_), pointer<T>(dy_), mutable_pointer<T>(da),
                         mutable_pointer<T>(db), mutable_pointer<T>(y), a_.numel());
  });
  return {da, db, y, sums ? column_sum(da.view({-1, da.size(-1)})) : at::Tensor()};
}

Tensors4 dispatch_backward(const at::Tensor& a, const Optional& b, const at::Tensor& dy, bool value,
                           bool sums) {
  static const auto op = registered<decltype(backward_cpu)>("megalodon::swiglu_backward");
  return op.call(a, b, dy, value, sums);
}

at::Tensor dispatch_forward(const at::Tensor& a, const Optional& b) {
  static const auto op = registered<decltype(forward_cpu)>("megalodon::swiglu");
  return op.call(a, b);
}

struct Swiglu : torch::autograd::Function<Swiglu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& a, const Optional& b,
                            const Optional& bias) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({a, b.value_or(at::Tensor())});
    ctx->saved_data["biased"] = bias && bias->requires_grad();
    return dispatch_forward(a, b);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto b = saved[1].defined() ? Optional(saved[1]) : std::nullopt;
    const auto [da, db, y, d_bias] =
        dispatch_backward(saved[0], b, dy[0], false, ctx->saved_data["biased"].toBool());
    return {da, db, d_bias};
  }
};

// float64 and devices without kernels are differentiated through the reference.
at::Tensor autograd(const at::Tensor& a, const Optional& b) {
  check(a, b);
  return has_fast_kernel(a) ? Swiglu::apply(a, b, Optional()) : swiglu_reference(a, b);
}

}  // namespace

at::Tensor swiglu(const at::Tensor& a, const Optional& b, const Optional& bias) {
  if (!bias || !needs_gradient({*bias})) return dispatch_forward(a, b);
  check(a, b, bias);
  return has_fast_kernel(a) ? Swiglu::apply(a, b, bias) : swiglu_reference(a, b, bias);
}

SwigluGradients swiglu_gradients(const at::Tensor& a, const Optional& b, const at::Tensor& dy, bool biased,
                                 bool value) {
  check(a, b);
  check_type("swiglu_gradients", "dy", dy, a.scalar_type());
  check_shape("swiglu_gradients", "dy", dy, a.sizes());
  TORCH_CHECK(has_fast_kernel(a),
              "[swiglu_gradients] a: expected float32 or bfloat16 on a device with kernels");
  const auto [da, db, y, d_bias] = dispatch_backward(a, b, dy, value, biased);
  return {da, db, y, d_bias};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("swiglu(Tensor a, Tensor? b=None) -> Tensor");
  m.def(
      "swiglu_backward(Tensor a, Tensor? b, Tensor dy, bool value, bool sums) -> (Tensor da, Tensor db, "
      "Tensor y, Tensor d_bias)");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("swiglu", &forward_cpu);
  m.impl("swiglu_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("swiglu", &autograd);
}

}  // namespace megalodon::ops
