#include <ATen/ATen.h>

#include "ops/check.h"
#include "ops/timestep_norm/timestep_norm.h"

namespace megalodon::ops {
namespace {

// [B, L, G]: of each step and group.
struct Statistics {
  at::Tensor mean, var;
};

Statistics moments(const at::Tensor& x_BLGK) {
  const auto mean = x_BLGK.mean(-1);
  return {mean, (x_BLGK - mean.unsqueeze(-1)).square().mean(-1)};
}

struct Scan {
  Statistics cumulative;
  at::Tensor count;  // [B, L]
};

// The cumulative statistics of every step. With n_t the count after step t and S_t the sum of the steps'
// means,
//   mean_t = (n_0 mean_0 + S_t) / n_t,
//   var_t = (n_0 var_0 + sum_{u <= t} (s_u + n_{u-1}/n_u (m_u - mean_{u-1})^2)) / n_t:
// the recurrence multiplied by n_t, a sum of terms that are not negative, so nothing cancels.
Scan scan(const Statistics& steps, const TimestepNormState& state, const at::Tensor& counted_BL) {
  const auto type = steps.mean.scalar_type();
  const auto count = state.count.unsqueeze(1) + counted_BL.cumsum(1);
  const auto weight = counted_BL.to(type).unsqueeze(-1);                        // [B, L, 1]
  const auto prior = state.count.to(type).view({-1, 1, 1});                     // [B, 1, 1]
  const auto total = count.to(type).clamp_min(1).unsqueeze(-1);                 // [B, L, 1]
  const auto before = (count - counted_BL).to(type).unsqueeze(-1);              // [B, L, 1]
  const auto mean_0 = state.mean.unsqueeze(1), var_0 = state.var.unsqueeze(1);  // [B, 1, G]

  // Where nothing was counted yet, the statistics are those that came in; what comes next forgets them.
  const auto empty = (count == 0).unsqueeze(-1);
  const auto shift = mean_0.masked_fill(prior == 0, 0);
  const auto mean = at::where(empty, mean_0, shift + ((steps.mean - shift) * weight).cumsum(1) / total);
  const auto mean_before = at::cat({mean_0, mean.slice(1, 0, -1)}, 1);
  const auto spread = before / total * (steps.mean - mean_before).square();
  const auto var =
      at::where(empty, var_0, (prior * var_0 + ((steps.var + spread) * weight).cumsum(1)) / total);
  return {{mean, var}, count};
}

}  // namespace

TimestepNormResult timestep_norm_reference(const at::Tensor& x, const at::Tensor& weight,
                                           const at::Tensor& bias, const TimestepNormState& state,
                                           const std::optional<at::Tensor>& padding_mask, double eps) {
  const auto B = x.size(0), L = x.size(1), D = x.size(2), G = state.mean.size(1);
  const auto x_BLGK = x.to(statistics_type(x)).view({B, L, G, D / G});
  const auto counted_BL =
      padding_mask ? padding_mask->eq(0).to(at::kLong) : at::ones({B, L}, x.options().dtype(at::kLong));

  const auto [cumulative, count] = scan(moments(x_BLGK), state, counted_BL);
  const auto normal_BLGK =
      (x_BLGK - cumulative.mean.unsqueeze(-1)) * (cumulative.var + eps).rsqrt().unsqueeze(-1);
  auto y = normal_BLGK.reshape({B, L, D}) * (1 + weight) + bias;
  if (padding_mask) y = y.masked_fill(counted_BL.unsqueeze(-1) == 0, 0);
  return {y.to(x.scalar_type()),
          {count.select(1, L - 1), cumulative.mean.select(1, L - 1), cumulative.var.select(1, L - 1)}};
}

}  // namespace megalodon::ops
