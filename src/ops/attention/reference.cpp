#include <ATen/ATen.h>

#include <limits>

#include "ops/attention/attention.h"
#include "ops/attention/dropout_mask.h"
#include "ops/check.h"
#include "ops/dropout/kernel.h"

namespace megalodon::ops {
namespace {

// 1/(1 - p) where the softmax weight is kept, else 0: [B, H, L, N], for queries at `position` [B, L] and keys
// whose index among those the query may see is `index` [B, L, N].
at::Tensor dropout_factors(const AttentionOptions& options, const at::Tensor& position,
                           const at::Tensor& index, int64_t H) {
  const int64_t B = index.size(0), L = index.size(1), N = index.size(2);
  const auto p = position.cpu(), j = index.cpu();
  const auto query = p.accessor<int64_t, 2>();
  const auto key = j.accessor<int64_t, 3>();
  auto factors = at::empty({B, H, L, N}, at::kDouble);
  auto factor = factors.accessor<double, 4>();
  const auto stream = static_cast<uint64_t>(options.dropout_key);
  const auto threshold = dropout_threshold(options.dropout);
  const double kept = 1 / (1 - options.dropout);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t t = 0; t < L; ++t)
        for (int64_t s = 0; s < N; ++s)
          factor[b][h][t][s] =
              dropout_word(stream, b * H + h, query[b][t], key[b][t][s]) < threshold ? 0.0 : kept;
  return factors.to(index.device());
}

}  // namespace

at::Tensor attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& start, const AttentionOptions& options,
                               const std::optional<AttentionCache>& cache) {
  const auto type = statistics_type(q);
  const int64_t H = q.size(2), group = H / k.size(2);
  const auto position = start.unsqueeze(1) + at::arange(q.size(1), start.options());  // [B, L]
  auto keys = k, values = v, key_position = position;  // [B, N, Hkv, d], [B, N]
  if (cache) {
    // The last position before `start` in each slot; negative where there is none.
    const int64_t C = cache->k.size(1);
    const auto last = start.unsqueeze(1) - 1;
    const auto held = last - at::remainder(last - at::arange(C, start.options()), C);
    keys = at::cat({cache->k, k}, 1);
    values = at::cat({cache->v, v}, 1);
    key_position = at::cat({held, position}, 1);
  }
  const auto first =
      options.chunk > 0
          ? (at::floor_divide(position, options.chunk) - options.previous_chunks).clamp_min(0) * options.chunk
          : at::zeros_like(position);
  const auto index = key_position.unsqueeze(1) - first.unsqueeze(2);  // [B, L, N]
  const auto visible = (index >= 0) & (key_position.unsqueeze(1) <= position.unsqueeze(2));

  // Slots that no query sees may hold anything.
  const auto unseen = visible.any(1).logical_not().unsqueeze(2).unsqueeze(3);
  const auto by_head = [&](const at::Tensor& x) {  // [B, H, N, d]
    return x.to(type).masked_fill(unseen, 0).repeat_interleave(group, 2).transpose(1, 2);
  };
  const auto scores = at::matmul(q.to(type).transpose(1, 2), by_head(keys).transpose(2, 3)) * options.scale;
  constexpr double kHidden = -std::numeric_limits<double>::infinity();
  auto weights = scores.masked_fill(visible.logical_not().unsqueeze(1), kHidden).softmax(3);
  if (options.dropout > 0) weights = weights * dropout_factors(options, position, index, H).to(type);
  return at::matmul(weights, by_head(values)).transpose(1, 2).to(q.scalar_type());
}

}  // namespace megalodon::ops
