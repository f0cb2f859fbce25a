#include "ops/linear_cross_entropy/linear_cross_entropy.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/check.h"
#include "ops/cross_entropy/cross_entropy.h"
#include "ops/product.h"
#include "ops/registered.h"

namespace megalodon::ops {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
           int64_t logits_at_once) {
  constexpr auto op = "linear_cross_entropy";
  check_activation(op, "hidden", hidden, 2);
  const int64_t N = hidden.size(0), D = hidden.size(1);
  check_type(op, "weight", weight, statistics_type(hidden));
  if (weight.dim() == 3) {
    check_shape(op, "weight", weight, {-1, -1, D});
    TORCH_CHECK(weight.size(0) >= 1 && N % weight.size(0) == 0,
                "[linear_cross_entropy] weight: expected a number of models that divides the ", N,
                " rows of hidden, got ", weight.size(0));
  } else {
    check_shape(op, "weight", weight, {-1, D});
  }
  TORCH_CHECK(weight.size(-2) >= 1, "[linear_cross_entropy] weight: expected at least one class, got shape ",
              weight.sizes());
  check_targets(op, targets, N, weight.size(-2));
  TORCH_CHECK(logits_at_once >= 1, "[linear_cross_entropy] logits_at_once: expected at least 1, got ",
              logits_at_once);
}

at::Tensor logit_gradients(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& nll,
                           const at::Tensor& d_nll, int64_t padding) {
  using Backward =
      at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t);
  static const auto op = registered<Backward>("megalodon::cross_entropy_backward");
  return op.call(logits, targets, nll, d_nll, padding);
}

// Of x [K, n] the sums [K], in two steps: a GPU sums a row in one block.
at::Tensor sums_of_rows(const at::Tensor& x) {
  const int64_t n = x.size(1), parts = std::clamp<int64_t>(n & -n, 1, 256);
  return x.unflatten(1, {parts, -1}).sum(2).sum(1);
}

struct Losses {
  at::Tensor mean;                // [K]
  at::Tensor d_hidden, d_weight;  // of each model's mean; undefined unless wanted
};

Losses losses(const at::Tensor& hidden, const at::Tensor& weights, const at::Tensor& targets,
              int64_t logits_at_once, bool gradients) {
  const int64_t K = weights.size(0), V = weights.size(1), N = hidden.size(0), each = N / K;
  // Rows of logits at multiples of 16 bytes, without which a GPU's products are slow.
  const int64_t padding = hidden.is_cuda() ? -V & 7 : 0;
  const int64_t most = std::max<int64_t>(1, logits_at_once / V);  // rows of a block
  const auto number = hidden.options().dtype(at::kFloat);
  const auto counted = sums_of_rows(targets.ne(kIgnoredTarget).view({K, each})).clamp_min(1);  // [K]
  const auto d_nll = counted.reciprocal().to(at::kFloat).unsqueeze(1).expand({K, each}).reshape({N});
  const auto nll = at::empty({N}, number);
  Losses result;
  if (gradients) {
    result.d_hidden = at::empty_like(hidden);
    result.d_weight = at::zeros({K, V + padding, hidden.size(1)}, number);
  }
  for (int64_t k = 0; k < K; ++k) {
    auto weight = weights[k].to(hidden.scalar_type());
    if (padding > 0) weight = at::constant_pad_nd(weight, {0, 0, 0, padding});  // [V + padding, D]
    for (int64_t first = k * each, end = first + each; first < end; first += most) {
      const auto block = [&](const at::Tensor& x) { return x.narrow(0, first, std::min(most, end - first)); };
      const auto x = block(hidden), target = block(targets);
      const auto logits = product(x, weight.t());  // [n, V + padding]
      const auto block_nll = cross_entropy(logits, target, padding);
      block(nll).copy_(block_nll);
      if (!gradients) continue;
      const auto d_logits = logit_gradients(logits, target, block_nll, block(d_nll), padding);
      put_product(block(result.d_hidden), d_logits, weight);
      add_product(result.d_weight[k], d_logits.t(), x);
    }
  }
  if (gradients) result.d_weight = result.d_weight.narrow(1, 0, V);
  result.mean = sums_of_rows(nll.view({K, each})) / counted;
  return result;
}

// Scales each x[k] by the k-th number. A second backward pass finds by its version that x has changed.
at::Tensor scale(const at::Tensor& x, const at::Tensor& scales) {
  static const auto op = registered<void(const at::Tensor&, const at::Tensor&)>("megalodon::scale_");
  op.call(x, scales);
  x.unsafeGetTensorImpl()->bump_version();
  return x;
}
void scale_cpu(const at::Tensor& x, const at::Tensor& scales) {
  x.mul_(scales.view({-1, 1, 1}));
}

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weights,
                            const at::Tensor& targets, int64_t logits_at_once) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto result = losses(hidden, weights, targets, logits_at_once, true);
    ctx->save_for_backward({result.d_hidden.unflatten(0, {weights.size(0), -1}), result.d_weight});
    return result.mean;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto saved = ctx->get_saved_variables();
    const auto &d_hidden = saved[0], &d_weight = saved[1];
    return {scale(d_hidden, upstream[0]).flatten(0, 1), scale(d_weight, upstream[0]), {}, {}};
  }
};

}  // namespace

at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                int64_t logits_at_once) {
  check(hidden, weight, targets, logits_at_once);
  if (!has_fast_kernel(hidden)) return linear_cross_entropy_reference(hidden, weight, targets);
  const bool stacked = weight.dim() == 3;
  const auto hidden_ = hidden.contiguous(), targets_ = targets.contiguous();
  const auto weights = stacked ? weight : weight.unsqueeze(0);
  const auto mean = needs_gradient({hidden, weight})
                        ? LinearCrossEntropy::apply(hidden_, weights, targets_, logits_at_once)
                        : losses(hidden_, weights, targets_, logits_at_once, false).mean;
  return stacked ? mean : mean.squeeze(0);
}

TORCH_LIBRARY_FRAGMENT(megalodon, m) {
  m.def("scale_(Tensor(a!) x, Tensor scales) -> ()");
}
TORCH_LIBRARY_IMPL(megalodon, CPU, m) {
  m.impl("scale_", &scale_cpu);
}

}  // namespace megalodon::ops
