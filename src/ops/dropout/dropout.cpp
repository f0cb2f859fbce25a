#include "ops/dropout/dropout.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/dropout/kernel.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const at::Tensor& x, double p) {
  check_activation("dropout", "x", x);
  TORCH_CHECK(p >= 0 && p < 1, "[dropout] p: expected 0 <= p < 1, got ", p);
}

at::Tensor forward_cpu(const at::Tensor& x, double p, int64_t key) {
  check(x, p);
  if (!has_fast_kernel(x)) return dropout_reference(x, p, key);
  const auto x_ = x.contiguous(), y = at::empty_like(x_);
  with_element_type(x, [&]<class T>(T*) {
    cpu::dropout(pointer<T>(x_), static_cast<uint64_t>(key), dropout_threshold(p),
                 static_cast<float>(1 / (1 - p)), x.numel(), mutable_pointer<T>(y));
  });
  return y;
}

at::Tensor dispatch(const at::Tensor& x, double p, int64_t key) {
  static const auto op = registered<decltype(forward_cpu)>("megalodon::dropout");
  return op.call(x, p, key);
}

// The gradient is dropped by the same words: linear in x, the operator is its own backward pass.
struct Dropout : torch::autograd::Function<Dropout> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, double p, int64_t key) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["p"] = p;
    ctx->saved_data["key"] = key;
    return dispatch(x, p, key);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    return {dispatch(dy[0], ctx->saved_data["p"].toDouble(), ctx->saved_data["key"].toInt()), {}, {}};
  }
};

// float64 and devices without kernels are differentiated through the reference.
at::Tensor autograd(const at::Tensor& x, double p, int64_t key) {
  check(x, p);
  return has_fast_kernel(x) ? Dropout::apply(x, p, key) : dropout_reference(x, p, key);
}

}  // namespace

at::Tensor dropout(const at::Tensor& x, double p, int64_t key) {
  return p == 0 ? x : dispatch(x, p, key);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("dropout(Tensor x, float p, int key) -> Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("dropout", &forward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("dropout", &autograd);
}

}  // namespace megalodon::ops
