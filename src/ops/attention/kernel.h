#pragma once
#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cpu {

struct AttentionSizes {
  std::int64_t B, L, H, Hkv, dk, dv;
  std::int64_t C;  // slots of the cache; 0: no cache
  std::int64_t chunk, previous_chunks;
  float scale;
  std::uint32_t dropout_threshold;  // 0: no dropout
  float kept;                       // 1/(1 - p)
  std::uint64_t dropout_key;
};

// The arguments of ops/attention/attention.h; the cache null where there is none.
template <class T>
struct AttentionInputs {
  const T *q, *k, *v;
  const std::int64_t* start;
  const T *cache_k, *cache_v;
};

// o [B, L, H, dv]; lse [B, H, L]: the logarithm of each softmax's denominator.
template <class T>
void attention_forward(const AttentionSizes& sizes, const AttentionInputs<T>& in, T* o, float* lse);

// Without a cache. dk, dv are G = T, or float where previous_chunks > 0: sums that start at zero, since
// several chunks add to a key's gradient.
template <class T, class G>
void attention_backward(const AttentionSizes& sizes, const AttentionInputs<T>& in, const T* o,
                        const float* lse, const T* d_o, T* dq, G* dk, G* dv);

// Sequences of one row of L positions: i has border[i] .. border[i + 1] - 1 (ops/packed_attention).
struct AttentionBorders {
  const std::int32_t* border;
  std::int64_t sequences;
};
// The same within each sequence; B = 1, and neither starts, chunks, cache nor dropout are looked at.
template <class T>
void packed_attention_forward(const AttentionSizes& sizes, const AttentionInputs<T>& in,
                              const AttentionBorders& borders, T* o, float* lse);
template <class T>
void packed_attention_backward(const AttentionSizes& sizes, const AttentionInputs<T>& in,
                               const AttentionBorders& borders, const T* o, const float* lse, const T* d_o,
                               T* dq, T* dk, T* dv);

}  // namespace megalodon::ops::cpu
