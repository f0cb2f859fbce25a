#include "ops/cross_entropy/cross_entropy.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/cross_entropy/kernel.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const at::Tensor& logits, const at::Tensor& targets) {
  constexpr auto op = "cross_entropy";
  check_activation(op, "logits", logits, 2);
  TORCH_CHECK(logits.size(1) >= 1, "[cross_entropy] logits: expected at least one class, got shape ",
              logits.sizes());
  check_targets(op, targets, logits.size(0), logits.size(1));
}

at::Tensor forward_cpu(const at::Tensor& logits, const at::Tensor& targets) {
  check(logits, targets);
  if (!has_fast_kernel(logits)) return cross_entropy_reference(logits, targets);
  const auto logits_ = logits.contiguous(), targets_ = targets.contiguous();
  const auto nll = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  with_element_type(logits, [&]<class E>(E*) {
    cpu::cross_entropy_forward(pointer<E>(logits_), pointer<int64_t>(targets_), kIgnoredTarget,
                               logits.size(0), logits.size(1), mutable_pointer<float>(nll));
  });
  return nll;
}

at::Tensor backward_cpu(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& nll,
                        const at::Tensor& d_nll) {
  const auto logits_ = logits.contiguous(), targets_ = targets.contiguous(), d_nll_ = d_nll.contiguous();
  const auto d_logits = at::empty_like(logits_);
  with_element_type(logits, [&]<class E>(E*) {
    cpu::cross_entropy_backward(pointer<E>(logits_), pointer<int64_t>(targets_), kIgnoredTarget,
                                pointer<float>(nll), pointer<float>(d_nll_), logits.size(0), logits.size(1),
                                mutable_pointer<E>(d_logits));
  });
  return d_logits;
}

at::Tensor dispatch(const at::Tensor& logits, const at::Tensor& targets) {
  static const auto op = registered<decltype(forward_cpu)>("megalodon::cross_entropy");
  return op.call(logits, targets);
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits, const at::Tensor& targets) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto nll = dispatch(logits, targets);
    ctx->save_for_backward({logits, targets, nll});
    return nll;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& d_nll) {
    static const auto op = registered<decltype(backward_cpu)>("megalodon::cross_entropy_backward");
    const auto saved = ctx->get_saved_variables();
    return {op.call(saved[0], saved[1], saved[2], d_nll[0]), {}};
  }
};

// float64 and devices without kernels are differentiated through the reference.
at::Tensor autograd(const at::Tensor& logits, const at::Tensor& targets) {
  check(logits, targets);
  return has_fast_kernel(logits) ? CrossEntropy::apply(logits, targets)
                                 : cross_entropy_reference(logits, targets);
}

}  // namespace

void check_targets(const char* op, const at::Tensor& targets, int64_t T, int64_t V) {
  check_type(op, "targets", targets, at::kLong);
  check_shape(op, "targets", targets, {T});
  if (!targets.is_cpu()) return;
  const auto targets_ = targets.contiguous();
  const auto* const values = targets_.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < T; ++t) {
    TORCH_CHECK((values[t] >= 0 && values[t] < V) || values[t] == kIgnoredTarget, "[", op,
                "] targets: expected 0 to ", V - 1, ", or ", kIgnoredTarget, " to ignore, got ", values[t],
                " at position ", t);
  }
}

at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& targets) {
  return dispatch(logits, targets);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("cross_entropy(Tensor logits, Tensor targets) -> Tensor");
  m.def("cross_entropy_backward(Tensor logits, Tensor targets, Tensor nll, Tensor d_nll) -> Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("cross_entropy", &forward_cpu);
  m.impl("cross_entropy_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("cross_entropy", &autograd);
}

}  // namespace megalodon::ops
