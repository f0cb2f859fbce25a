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

void check(const at::Tensor& logits, const at::Tensor& targets, int64_t padding) {
  constexpr auto op = "cross_entropy";
  check_activation(op, "logits", logits, 2);
  const int64_t V = logits.size(1) - padding;
  TORCH_CHECK(padding >= 0 && V >= 1, "[cross_entropy] logits: expected at least one class, got shape ",
              logits.sizes(), " with ", padding, " columns of padding");
  check_targets(op, targets, logits.size(0), V);
}

at::Tensor classes(const at::Tensor& logits, int64_t padding) {
  return logits.narrow(1, 0, logits.size(1) - padding);
}

at::Tensor forward_cpu(const at::Tensor& logits, const at::Tensor& targets, int64_t padding) {
  check(logits, targets, padding);
  if (!has_fast_kernel(logits)) return cross_entropy_reference(classes(logits, padding), targets);
  const auto logits_ = classes(logits, padding).contiguous(), targets_ = targets.contiguous();
  const auto nll = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  with_element_type(logits, [&]<class E>(E*) {
    cpu::cross_entropy_forward(pointer<E>(logits_), pointer<int64_t>(targets_), kIgnoredTarget,
                               logits_.size(0), logits_.size(1), mutable_pointer<float>(nll));
  });
  return nll;
}

at::Tensor backward_cpu(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& nll,
                        const at::Tensor& d_nll, int64_t padding) {
  const auto logits_ = classes(logits, padding).contiguous(), targets_ = targets.contiguous(),
             d_nll_ = d_nll.contiguous();
  const auto d_logits = at::empty_like(logits_);
  with_element_type(logits, [&]<class E>(E*) {
    cpu::cross_entropy_backward(pointer<E>(logits_), pointer<int64_t>(targets_), kIgnoredTarget,
                                pointer<float>(nll), pointer<float>(d_nll_), logits_.size(0), logits_.size(1),
                                mutable_pointer<E>(d_logits));
  });
  return padding == 0 ? d_logits : at::constant_pad_nd(d_logits, {0, padding});
}

at::Tensor dispatch(const at::Tensor& logits, const at::Tensor& targets, int64_t padding) {
  static const auto op = registered<decltype(forward_cpu)>("megalodon::cross_entropy");
  return op.call(logits, targets, padding);
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits, const at::Tensor& targets,
                            int64_t padding) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto nll = dispatch(logits, targets, padding);
    ctx->save_for_backward({logits, targets, nll});
    ctx->saved_data["padding"] = padding;
    return nll;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& d_nll) {
    static const auto op = registered<decltype(backward_cpu)>("megalodon::cross_entropy_backward");
    const auto saved = ctx->get_saved_variables();
    return {op.call(saved[0], saved[1], saved[2], d_nll[0], ctx->saved_data["padding"].toInt()), {}, {}};
  }
};

// float64 and devices without kernels are differentiated through the reference.
at::Tensor autograd(const at::Tensor& logits, const at::Tensor& targets, int64_t padding) {
  check(logits, targets, padding);
  return has_fast_kernel(logits) ? CrossEntropy::apply(logits, targets, padding)
                                 : cross_entropy_reference(classes(logits, padding), targets);
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

at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& targets, int64_t padding) {
  return dispatch(logits, targets, padding);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("cross_entropy(Tensor logits, Tensor targets, int padding=0) -> Tensor");
  m.def(
      "cross_entropy_backward(Tensor logits, Tensor targets, Tensor nll, Tensor d_nll, int padding=0) -> "
      "Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("cross_entropy", &forward_cpu);
  m.impl("cross_entropy_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(megalodon, Autograd, m) {
  m.impl("cross_entropy", &autograd);
}

}  // namespace megalodon::ops
