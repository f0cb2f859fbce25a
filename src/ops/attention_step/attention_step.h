#pragma once
#include <ATen/core/Tensor.h>

#include "ops/attention/attention.h"

namespace megalodon::ops {

struct QueryKeyParameters {
  at::Tensor gamma, beta;  // [2, H dz] float32
  int64_t chunk;           // positions; at least 1
  double rope_base, eps;
};

// One step of gated attention inside chunks over a cache, without gradients:
//   q, k = query_key(z) of ops/query_key/query_key.h,   o = attention(q, k, v) of ops/attention/attention.h,
//   times
// the gate; k and v join the cache. z [B, 1, H, dz], v [B, 1, H, dv] and gate [B, 1, H dv] of one dtype,
// start [B] int64; the cache [B, C, H, d], contiguous, C >= chunk. Returns [B, 1, H dv].
at::Tensor attention_step(const at::Tensor& z, const QueryKeyParameters& parameters, const at::Tensor& v,
                          const at::Tensor& gate, const at::Tensor& start, const AttentionCache& cache);

// The same with the two operators. Any device; float32, bfloat16 or float64.
at::Tensor attention_step_reference(const at::Tensor& z, const QueryKeyParameters& parameters,
                                    const at::Tensor& v, const at::Tensor& gate, const at::Tensor& start,
                                    const AttentionCache& cache);

}  // namespace megalodon::ops
