#pragma once
#include <ATen/core/Tensor.h>
#include <optional>

namespace megalodon::ops {

// Keys and values of the positions before `start`: position p of row b is at slot p mod C.
struct AttentionCache {
  at::Tensor k;  // [B, C, Hkv, dk]
  at::Tensor v;  // [B, C, Hkv, dv]
};

struct AttentionOptions {
  int64_t chunk = 0;  // positions a chunk; 0: the whole sequence is one chunk (plain causal attention)
  int64_t previous_chunks = 0;  // how many earlier chunks a position sees besides its own
  double scale = 1.0;           // multiplies q k^T
  double dropout = 0.0;         // on the softmax weights
  int64_t dropout_key = 0;      // ops/dropout/dropout.h; used where dropout > 0
};

// Causal attention confined to chunks: the query at position p sees the positions s <= p with
// floor(s/chunk) >= floor(p/chunk) - previous_chunks. The query t of row b is at position start[b] + t.
// q [B, L, H, dk], k [B, L, Hkv, dk], v [B, L, Hkv, dv] float32 or bfloat16 (float64 runs the reference), H a
// multiple of Hkv (grouped queries: head h reads key head floor(h / (H/Hkv))); start [B] int64 >= 0. The
// softmax is float32. Keys before start[b] come from `cache` (in the dtype of q), which must hold all that
// are visible; without a cache every start[b] must see nothing earlier: at a chunk's border, or 0 where
// chunk = 0 or previous_chunks > 0. The cache is read, never written, and only where no gradient is wanted.
// Work is confined to what is visible; no [chunk, chunk] matrix for all chunks at once.
// Returns o [B, L, H, dv]. Differentiable in q, k, v where there is no cache.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start,
                     const AttentionOptions& options, const std::optional<AttentionCache>& cache = {});

// attention() of a call whose keys and values then join the cache (ops/cache_store), which must have slots
// for them beside all that the call sees. Without gradients.
at::Tensor attention_and_store(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& start, const AttentionOptions& options,
                               const AttentionCache& cache);

// attention() in plain torch operations. Any device; float32 or float64.
at::Tensor attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& start, const AttentionOptions& options,
                               const std::optional<AttentionCache>& cache = {});

}  // namespace megalodon::ops
