#include "ops/cross_entropy/cross_entropy.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/check.h"

namespace megalodon::ops {
namespace {

// On other devices a look at the values would wait for the device.
void check_values(const at::Tensor& targets, int64_t V) {
  const auto targets_ = targets.contiguous();
  const auto* const values = targets_.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < targets_.numel(); ++t) {
    TORCH_CHECK((values[t] >= 0 && values[t] < V) || values[t] == kIgnoredTarget,
                "[cross_entropy] targets: expected 0 to ", V - 1, ", or ", kIgnoredTarget, " to ignore, got ",
                values[t], " at position ", t);
  }
}

void check(const at::Tensor& logits, const at::Tensor& targets) {
  constexpr auto op = "cross_entropy";
  check_activation(op, "logits", logits, 2);
  TORCH_CHECK(logits.size(1) >= 1, "[cross_entropy] logits: expected at least one class, got shape ",
              logits.sizes());
  check_type(op, "targets", targets, at::kLong);
  check_shape(op, "targets", targets, {logits.size(0)});
  if (targets.is_cpu()) check_values(targets, logits.size(1));
}

at::Tensor composite(const at::Tensor& logits, const at::Tensor& targets) {
  check(logits, targets);
  return cross_entropy_reference(logits, targets);
}

}  // namespace

at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& targets) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("megalodon::cross_entropy", "")
                             .typed<decltype(composite)>();
  return op.call(logits, targets);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("cross_entropy(Tensor logits, Tensor targets) -> Tensor");
}
TORCH_LIBRARY_IMPL(megalodon, CompositeImplicitAutograd, m) {
  m.impl("cross_entropy", &composite);
}

}  // namespace megalodon::ops
