#include "ops/attention/cuda.h"
#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 128;

// A block a row.
template <class T, int V>
__global__ void softmax(Scores s, const float* scores, T* weights, float* lse) {
  const std::int64_t row = blockIdx.x, matrix = row / s.queries, query = row % s.queries,
                     seen = s.first + query + 1;
  scores += row * s.keys, weights += row * s.keys;
  float largest = -INFINITY, v[V];
  for (std::int64_t i = threadIdx.x * V; i < seen; i += kThreads * V) {
    load(scores + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) largest = fmaxf(largest, i + j < seen ? v[j] * s.scale : -INFINITY);
  }
  largest = block_max<kThreads / 32>(largest);
  float sums[1] = {0};
  for (std::int64_t i = threadIdx.x * V; i < seen; i += kThreads * V) {
    load(scores + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) sums[0] += i + j < seen ? __expf(v[j] * s.scale - largest) : 0;
  }
  block_sum(sums);
  const float factor = 1 / sums[0];
  for (std::int64_t i = threadIdx.x * V; i < s.keys; i += kThreads * V) {
    load(scores + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = i + j < seen ? __expf(v[j] * s.scale - largest) * factor : 0;
    store(v, weights + i);
  }
  if (threadIdx.x == 0) lse[matrix * s.matrix_step + query * s.query_step] = largest + logf(sums[0]);
}

template <class T, int V>
__global__ void softmax_backward(Scores s, const float* scores, const float* d_weights, const float* lse,
                                 const float* delta, std::int64_t keys_of_chunk, T* weights, T* d_scores) {
  const std::int64_t row = blockIdx.x, matrix = row / s.queries, query = row % s.queries,
                     seen = s.first + query + 1;
  const std::int64_t number = matrix * s.matrix_step + query * s.query_step;
  const std::int64_t to = (matrix * keys_of_chunk + query) * keys_of_chunk;
  const float log_sum = lse[number], taken = delta[number];
  scores += row * s.keys, d_weights += row * s.keys, weights += to, d_scores += to;
  for (std::int64_t i = threadIdx.x * V; i < s.keys; i += kThreads * V) {
    float v[V], d[V];
    load(scores + i, v);
    load(d_weights + i, d);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      v[j] = i + j < seen ? __expf(v[j] * s.scale - log_sum) : 0;
      d[j] = i + j < seen ? v[j] * (d[j] - taken) * s.scale : 0;
    }
    store(v, weights + i);
    store(d, d_scores + i);
  }
}

// A warp a row.
template <class T, int V>
__global__ void products(const T* o, const T* d_o, std::int64_t rows, std::int64_t d, float* delta) {
  const std::int64_t row = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  float sum = 0;
  for (std::int64_t i = threadIdx.x % 32 * V; i < d; i += 32 * V) {
    float a[V], b[V];
    load(o + row * d + i, a);
    load(d_o + row * d + i, b);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += a[j] * b[j];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

// Packs of 4, which rows of both float scores and weights of T allow.
template <class F, class... P>
void with_packs_of_four(std::int64_t columns, F&& f, const P*... pointers) {
  const auto bits = (std::uintptr_t{0} | ... | reinterpret_cast<std::uintptr_t>(pointers));
  columns % 4 == 0 && bits % 16 == 0 ? f(Width<4>{}) : f(Width<1>{});
}

}  // namespace

template <class T>
void causal_softmax(const Scores& s, const float* scores, T* weights, float* lse, cudaStream_t stream) {
  with_packs_of_four(
      s.keys,
      [&]<int V>(Width<V>) {
        softmax<T, V><<<grid_size(s.matrices * s.queries), kThreads, 0, stream>>>(s, scores, weights, lse);
      },
      scores, weights);
}

template <class T>
void causal_softmax_backward(const Scores& s, const float* scores, const float* d_weights, const float* lse,
                             const float* delta, std::int64_t keys_of_chunk, T* weights, T* d_scores,
                             cudaStream_t stream) {
  with_packs_of_four(
      s.keys | keys_of_chunk,
      [&]<int V>(Width<V>) {
        softmax_backward<T, V><<<grid_size(s.matrices * s.queries), kThreads, 0, stream>>>(
            s, scores, d_weights, lse, delta, keys_of_chunk, weights, d_scores);
      },
      scores, d_weights, weights, d_scores);
}

template <class T>
void row_products(const T* o, const T* d_o, std::int64_t rows, std::int64_t d, float* delta,
                  cudaStream_t stream) {
  with_pack_width<T>(
      d,
      [&]<int V>(Width<V>) {
        products<T, V>
            <<<grid_size(ceil_div(rows, kThreads / 32)), kThreads, 0, stream>>>(o, d_o, rows, d, delta);
      },
      o, d_o);
}

template void causal_softmax(const Scores&, const float*, float*, float*, cudaStream_t);
template void causal_softmax(const Scores&, const float*, Bfloat16*, float*, cudaStream_t);
template void causal_softmax_backward(const Scores&, const float*, const float*, const float*, const float*,
                                      std::int64_t, float*, float*, cudaStream_t);
template void causal_softmax_backward(const Scores&, const float*, const float*, const float*, const float*,
                                      std::int64_t, Bfloat16*, Bfloat16*, cudaStream_t);
template void row_products(const float*, const float*, std::int64_t, std::int64_t, float*, cudaStream_t);
template void row_products(const Bfloat16*, const Bfloat16*, std::int64_t, std::int64_t, float*,
                           cudaStream_t);

}  // namespace megalodon::ops::cuda
