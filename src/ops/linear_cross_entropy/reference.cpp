#include <ATen/ATen.h>

#include "ops/cross_entropy/cross_entropy.h"
#include "ops/linear_cross_entropy/linear_cross_entropy.h"

namespace megalodon::ops {

at::Tensor linear_cross_entropy_reference(const at::Tensor& hidden, const at::Tensor& weight,
                                          const at::Tensor& targets) {
  const bool stacked = weight.dim() == 3;
  const auto weights = stacked ? weight : weight.unsqueeze(0);  // [K, V, D]
  const int64_t K = weights.size(0), each = hidden.size(0) / K;
  const auto logits = at::bmm(hidden.reshape({K, each, hidden.size(1)}), weights.transpose(1, 2));
  const auto nll = cross_entropy_reference(logits.flatten(0, 1), targets).view({K, each});
  const auto counted = targets.ne(kIgnoredTarget).reshape({K, each}).sum(1).clamp_min(1);
  const auto mean = nll.sum(1) / counted;  // [K]
  return stacked ? mean : mean.squeeze(0);
}

}  // namespace megalodon::ops
