#include <ATen/ATen.h>

#include "ops/check.h"
#include "ops/cross_entropy/cross_entropy.h"

namespace megalodon::ops {

at::Tensor cross_entropy_reference(const at::Tensor& logits, const at::Tensor& targets) {
  const auto logits_ = logits.to(statistics_type(logits));
  const auto ignored = targets == kIgnoredTarget;
  const auto index = targets.masked_fill(ignored, 0).unsqueeze(-1);
  const auto nll = at::logsumexp(logits_, -1) - logits_.gather(-1, index).squeeze(-1);
  return nll.masked_fill(ignored, 0);
}

}  // namespace megalodon::ops
