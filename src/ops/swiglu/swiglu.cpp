#include "ops/swiglu/swiglu.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"
#include "ops/swiglu/kernel.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const at::Tensor& a, const std::optional<at::Tensor>& b) {
  check_activation("swiglu", "a", a);
  if (!b) return;
  check_type("swiglu", "b", *b, a.scalar_type());
  check_shape("swiglu", "b", *b, a.sizes());
}

at::Tensor forward_cpu(const at::Tensor& a, const std::optional<at::Tensor>& b) {
  check(a, b);
  if (!has_fast_kernel(a)) return swiglu_reference(a, b);
  const auto a_ = a.contiguous(), b_ = b ? b->contiguous() : at::Tensor();
  auto y = at::empty_like(a_);
  with_element_type(a, [&]<class T>(T*) {
    cpu::swiglu_forward(pointer<T>(a_), pointer<T>(b_), mutable_pointer<T>(y), a_.numel());
  });
  return y;
}

// The third is y again where `value` asks for it.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cpu(const at::Tensor& a,
                                                            const std::optional<at::Tensor>& b,
                                                            const at::Tensor& dy, bool value) {
  const auto a_ = a.contiguous(), b_ = b ? b->contiguous() : at::Tensor(), dy_ = dy.contiguous();
  auto da = at::empty_like(a_), db = b ? at::empty_like(b_) : at::Tensor(),
       y = value ? at::empty_like(a_) : at::Tensor();
  with_element_type(a, [&]<class T>(T*) {
    cpu::swiglu_backward(pointer<T>(a_), pointer<T>(b_), pointer<T>(dy_), mutable_pointer<T>(da),
                         mutable_pointer<T>(db), mutable_pointer<T>(y), a_.numel());
  });
  return {da, db, y};
}

auto dispatch_backward(const at::Tensor& a, const std::optional<at::Tensor>& b, const at::Tensor& dy,
                       bool value) {
  static const auto op = registered<decltype(backward_cpu)>("megalodon::swiglu_backward");
  return op.call(a, b, dy, value);
}

at::Tensor dispatch_forward(const at::Tensor& a, const std::optional<at::Tensor>& b) {
  static const auto op = registered<decltype(forward_cpu)>("megalodon::swiglu");
  return op.call(a, b);
}

struct Swiglu : torch::autograd::Function<Swiglu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& a, const std::optional<at::Tensor>& b) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({a, b.value_or(at::Tensor())});
    return dispatch_forward(a, b);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto b = saved[1].defined() ? std::optional(saved[1]) : std::nullopt;
    const auto [da, db, y] = dispatch_backward(saved[0], b, dy[0], false);
    return {da, db};
  }
};

// float64 and devices without kernels are differentiated through the reference.
at::Tensor autograd(const at::Tensor& a, const std::optional<at::Tensor>& b) {
  check(a, b);
  return has_fast_kernel(a) ? Swiglu::apply(a, b) : swiglu_reference(a, b);
}

}  // namespace

at::Tensor swiglu(const at::Tensor& a, const std::optional<at::Tensor>& b) {
  return dispatch_forward(a, b);
}

SwigluGradients swiglu_gradients(const at::Tensor& a, const std::optional<at::Tensor>& b,
                                 const at::Tensor& dy) {
  check(a, b);
  check_type("swiglu_gradients", "dy", dy, a.scalar_type());
  check_shape("swiglu_gradients", "dy", dy, a.sizes());
  TORCH_CHECK(has_fast_kernel(a),
              "[swiglu_gradients] a: expected float32 or bfloat16 on a device with kernels");
  const auto [da, db, y] = dispatch_backward(a, b, dy, true);
  return {da, db, y};
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("swiglu(Tensor a, Tensor? b=None) -> Tensor");
  m.def("swiglu_backward(Tensor a, Tensor? b, Tensor dy, bool value) -> (Tensor da, Tensor db, Tensor y)");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("swiglu", &forward_cpu);
  m.impl("swiglu_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("swiglu", &autograd);
}

}  // namespace megalodon::ops
