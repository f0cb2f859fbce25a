#include <ATen/ATen.h>

#include "ops/attention_step/attention_step.h"
#include "ops/query_key/query_key.h"

namespace megalodon::ops {

at::Tensor attention_step_reference(const at::Tensor& z, const QueryKeyParameters& p, const at::Tensor& v,
                                    const at::Tensor& gate, const at::Tensor& start,
                                    const AttentionCache& cache) {
  const auto [q, k] = query_key(z, p.gamma, p.beta, start, p.chunk, p.rope_base, p.eps);
  const auto o = attention(q, k, v, start, {.chunk = p.chunk}, cache);
  const int64_t B = z.size(0), C = cache.k.size(1);
  const auto slots = at::arange(B, start.options()) * C + start.remainder(C);
  cache.k.view({B * C, -1}).index_copy_(0, slots, k.view({B, -1}));
  cache.v.view({B * C, -1}).index_copy_(0, slots, v.reshape({B, -1}));
  return o.flatten(2) * gate;
}

}  // namespace megalodon::ops
