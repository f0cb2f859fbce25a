#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// Scores of some queries of each of many chunks against the keys of their chunk: [matrices, queries, keys].
// The query i of them stands at `first` + i in its chunk and sees the keys up to there; the others' weights
// are 0.
struct Scores {
  std::int64_t matrices, queries, first, keys;
  float scale;
  // Of arrays with a number for each query, from their first: steps from chunk to chunk and from query to
  // query.
  std::int64_t matrix_step, query_step;
};

// Softmax of scores times scale into weights [matrices, queries, keys]; lse: the logarithms of the
// denominators.
template <class T>
void causal_softmax(const Scores& shape, const float* scores, T* weights, float* lse, cudaStream_t stream);

// The weights again from scores and lse, and from the gradients of the weights those of the scores,
// weights (d_weights - delta) scale: rows of matrices [keys_of_chunk, keys_of_chunk], the first query's
// given.
template <class T>
void causal_softmax_backward(const Scores& shape, const float* scores, const float* d_weights,
                             const float* lse, const float* delta, std::int64_t keys_of_chunk, T* weights,
                             T* d_scores, cudaStream_t stream);

// delta [rows]: the products of o and d_o [rows, d], which the softmax's gradient takes off.
template <class T>
void row_products(const T* o, const T* d_o, std::int64_t rows, std::int64_t d, float* delta,
                  cudaStream_t stream);

// Heads of 256 and values of a multiple of 256 in chunks of a multiple of 256, bfloat16, on Hopper GPUs:
// kernels of their own. All pointers are multiples of 16 bytes.
bool has_wide_kernels(std::int64_t key_width, std::int64_t value_width, std::int64_t length);

// `heads` heads, from `first_head` on, of `count` chunks: positions first + i step .. + length - 1 of the
// `positions` = B L of all tensors.
struct WideSizes {
  std::int64_t positions, count, length, first, step;
  std::int64_t H, Hkv, first_head, heads;
  std::int64_t dv;
  float scale;
};
struct WideScratch {
  Bfloat16 *weights, *d_scores;  // [count, heads, length, length]; d_scores: backward alone
  float* sums;                   // [count, heads, length], forward alone
  int* next;                     // [2]
};
void wide_forward(const WideSizes& sizes, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v,
                  const WideScratch& scratch, Bfloat16* o, float* lse, cudaStream_t stream);
// Gradients for each query head: dk [B L, H, dk], dv [B L, H, dv].
void wide_backward(const WideSizes& sizes, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v,
                   const float* lse, const float* delta, const Bfloat16* d_o, const WideScratch& scratch,
                   Bfloat16* dq, Bfloat16* dk, Bfloat16* dv, cudaStream_t stream);

// Whether narrow heads of that width in chunks of that length, bfloat16, have kernels of their own on the
// current device.
bool has_small_kernels(std::int64_t width, std::int64_t length);

// `count` chunks: positions first + i step .. + length - 1 of those of all tensors, [positions, heads, width]
// at multiples of 16 bytes, heads one after the other; lse [positions, H]. With borders [count + 1], which
// are on the device, chunk i is positions borders[i] .. borders[i + 1] - 1, at most `length` of them.
struct SmallSizes {
  std::int64_t count, length, first, step;
  std::int64_t H, Hkv, width;
  float scale;
  const std::int32_t* borders = nullptr;
};
// A tensor whose positions are `row` elements apart.
template <class T>
struct SmallHeads {
  T* first;
  std::int64_t row;
};
struct SmallInputs {
  SmallHeads<const Bfloat16> q, k, v;
};
struct SmallGradients {
  SmallHeads<Bfloat16> dq, dk, dv;  // of each query head: all [positions, H, width]
};
void small_forward(const SmallSizes& sizes, const SmallInputs& in, Bfloat16* o, float* lse,
                   cudaStream_t stream);
void small_backward(const SmallSizes& sizes, const SmallInputs& in, const Bfloat16* o, const float* lse,
                    const Bfloat16* d_o, const SmallGradients& out, cudaStream_t stream);

struct CachedSizes {
  std::int64_t B, L, H, Hkv, dk, dv;
  std::int64_t C;  // slots of the cache
  std::int64_t chunk, previous_chunks;
  float scale;
  std::int64_t q_row, k_row, v_row;  // elements from position to position of q, k and v
  bool stores = false;               // whether keys and values join the cache, of calls with L = 1
};
// The arguments of ops/attention/attention.h, heads of a position one after the other; C = 0 where there is
// no cache.
template <class T>
struct CachedInputs {
  const T *q, *k, *v;
  const std::int64_t* start;
  T *cache_k, *cache_v;
};
// Whether the kernel for such heads can store.
template <class T>
bool cached_attention_stores(const CachedSizes& sizes);
// o [B, L, H, dv], each query by itself; all pointers are multiples of 16 bytes. Each query's keys are shared
// among cached_splits; where those are several, parts [B L H, splits, dv + 2] is scratch memory.
template <class T>
std::int64_t cached_splits(const CachedSizes& sizes);
template <class T>
void cached_attention(const CachedSizes& sizes, const CachedInputs<T>& in, std::int64_t splits, float* parts,
                      T* o, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
