#include "ops/rope/rope.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/registered.h"
#include "ops/rope/kernel.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base) {
  check_activation("rope", "x", x, 4);
  TORCH_CHECK(x.size(3) % 2 == 0, "[rope] x: expected an even number of features in a head, got ", x.size(3));
  check_type("rope", "start", start, at::kLong);
  check_shape("rope", "start", start, {x.size(0)});
  TORCH_CHECK(chunk >= 0, "[rope] chunk: expected at least 0, got ", chunk);
  TORCH_CHECK(base > 0, "[rope] base: expected a positive number, got ", base);
}

at::Tensor forward_cpu(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base,
                       bool inverse) {
  check(x, start, chunk, base);
  if (!has_fast_kernel(x)) return rope_reference(x, start, chunk, base, inverse);
  const auto x_ = x.contiguous(), start_ = start.contiguous(), y = at::empty_like(x_);
  const int64_t B = x.size(0), L = x.size(1), H = x.size(2), d = x.size(3);
  const cpu::Rotations rotations(pointer<int64_t>(start_), B, L, chunk, base, d);
  with_element_type(x, [&]<class T>(T*) {
    cpu::rope(pointer<T>(x_), rotations, inverse, B, L, H, d, mutable_pointer<T>(y));
  });
  return y;
}

at::Tensor dispatch(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base, bool inverse) {
  static const auto op = registered<decltype(forward_cpu)>("megalodon::rope");
  return op.call(x, start, chunk, base, inverse);
}

// A rotation is orthogonal: the gradient is turned back.
struct Rope : torch::autograd::Function<Rope> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& start, int64_t chunk,
                            double base, bool inverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({start});
    ctx->saved_data["chunk"] = chunk;
    ctx->saved_data["base"] = base;
    ctx->saved_data["inverse"] = inverse;
    return dispatch(x, start, chunk, base, inverse);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    auto& data = ctx->saved_data;
    return {dispatch(dy[0], ctx->get_saved_variables()[0], data["chunk"].toInt(), data["base"].toDouble(),
                     !data["inverse"].toBool()),
            {},
            {},
            {},
            {}};
  }
};

// float64 and devices without kernels are differentiated through the reference.
at::Tensor autograd(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base, bool inverse) {
  check(x, start, chunk, base);
  return has_fast_kernel(x) ? Rope::apply(x, start, chunk, base, inverse)
                            : rope_reference(x, start, chunk, base, inverse);
}

}  // namespace

at::Tensor rope(const at::Tensor& x, const at::Tensor& start, int64_t chunk, double base, bool inverse) {
  return dispatch(x, start, chunk, base, inverse);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("rope(Tensor x, Tensor start, int chunk, float base, bool inverse=False) -> Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("rope", &forward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("rope", &autograd);
}

}  // namespace megalodon::ops
