#include "ops/cuda_rows.h"
#include "ops/cuda_step.h"
#include "ops/rms_norm/cuda.h"

namespace megalodon::ops::cuda {
namespace {

template <class T, int V, bool kKept, int kRows>
__global__ void __launch_bounds__(kMostRowThreads)
    forward(const T* x, const float* weight, float eps, std::int64_t rows, std::int64_t D, T* y,
            float* rstd) {
  if constexpr (kRows == 1) let_next_start();
  extern __shared__ uint4 shared[];
  const std::int64_t first = std::int64_t{blockIdx.x} * kRows, k = blockIdx.y;
  if (weight != nullptr) weight += k * D;
  prefetch_columns<V, kKept>(rows, D, weight);
  wait_for_previous();
  const ColumnNumbers<V, kKept> weights(weight, D);
  x += k * rows * D, y += k * rows * D, rstd += k * rows;
  const auto tile = read_rows<T, V, kKept, kRows>(x, rows, D, first, shared);
  float v[V], sums[kRows] = {};
  for_columns<V, kKept>(D, [&](std::int64_t i) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      tile.read(r, i, v);
#pragma unroll
      for (int j = 0; j < V; ++j) sums[r] += v[j] * v[j];
    }
  });
  block_sum(sums);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    sums[r] = 1 / sqrtf(sums[r] / static_cast<float>(D) + eps);
    if (threadIdx.x == 0 && first + r < rows) rstd[first + r] = sums[r];
  }
  for_columns<V, kKept>(D, [&](std::int64_t i) {
    float w[V];
    weights.read(i, w);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= rows) break;
      tile.read(r, i, v);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] *= sums[r] * (1 + w[j]);
      store(v, y + (first + r) * D + i);
    }
  });
}

// With g = dy (1 + weight) and r = rstd: dx = r (g - x r^2 mean(g x)), d_weight = sum of dy x r over the
// rows.
template <class T, int V, bool kKept>
__global__ void __launch_bounds__(kMostRowThreads)
    backward(const T* x, const float* weight, const float* rstd, const T* dy, std::int64_t rows,
             std::int64_t D, T* dx, float* d_weight) {
  extern __shared__ uint4 shared[];
  const std::int64_t k = blockIdx.y;
  x += k * rows * D, dy += k * rows * D, dx += k * rows * D, rstd += k * rows;
  ColumnTotals<1, V, kKept> columns(reinterpret_cast<float*>(shared), D);
  for_row_tiles<T, V, kKept>(x, dy, rows, D, shared,
                             [&](std::int64_t first, const auto& x_tile, const auto& dy_tile) {
                               float w[V] = {}, v[V], d[V], root[kTileRows], sums[kTileRows] = {};
#pragma unroll
                               for (int r = 0; r < kTileRows; ++r) root[r] = rstd[min(first + r, rows - 1)];
                               for_columns<V, kKept>(D, [&](std::int64_t i) {
                                 if (weight != nullptr) load(weight + k * D + i, w);
#pragma unroll
                                 for (int r = 0; r < kTileRows; ++r) {
                                   x_tile.read(r, i, v);
                                   dy_tile.read(r, i, d);
#pragma unroll
                                   for (int j = 0; j < V; ++j) {
                                     sums[r] += v[j] * d[j] * (1 + w[j]);
                                     if (weight != nullptr) columns.add(0, i, j, d[j] * v[j] * root[r]);
                                   }
                                 }
                               });
                               block_sum(sums);
                               for_columns<V, kKept>(D, [&](std::int64_t i) {
                                 if (weight != nullptr) load(weight + k * D + i, w);
#pragma unroll
                                 for (int r = 0; r < kTileRows; ++r) {
                                   if (first + r >= rows) break;
                                   const float pull = root[r] * root[r] * sums[r] / static_cast<float>(D);
                                   x_tile.read(r, i, v);
                                   dy_tile.read(r, i, d);
#pragma unroll
                                   for (int j = 0; j < V; ++j)
                                     d[j] = root[r] * (d[j] * (1 + w[j]) - v[j] * pull);
                                   store(d, dx + (first + r) * D + i);
                                 }
                               });
                             });
  if (weight != nullptr) columns.store(d_weight + (blockIdx.x * std::int64_t{gridDim.y} + k) * D);
}

}  // namespace

template <class T>
void rms_norm_forward(const T* x, const float* weight, float eps, std::int64_t K, std::int64_t rows,
                      std::int64_t D, T* y, float* rstd, cudaStream_t stream) {
  if (rows == 0) return;
  with_row_layout<T>(
      D, 1, 0,
      [&]<int V, bool kKept>(unsigned threads, std::size_t bytes) {
        with_rows_of_block(rows, [&]<int kRows>(Width<kRows>) {
          const dim3 grid(grid_size(ceil_div(rows, kRows)), static_cast<unsigned>(K));
          allow_shared_memory(forward<T, V, kKept, kRows>, bytes);
          launch_step({grid, threads, bytes, stream}, forward<T, V, kKept, kRows>, x, weight, eps, rows, D, y,
                      rstd);
        });
      },
      x, weight, y);
}

template <class T>
void rms_norm_backward(const T* x, const float* weight, const float* rstd, const T* dy, std::int64_t K,
                       std::int64_t rows, std::int64_t D, std::int64_t blocks, T* dx, float* d_weight,
                       cudaStream_t stream) {
  if (rows == 0) return;
  with_row_layout<T>(
      D, 4, 1,
      [&]<int V, bool kKept>(unsigned threads, std::size_t bytes) {
        const dim3 grid(grid_size(blocks), static_cast<unsigned>(K));
        allow_shared_memory(backward<T, V, kKept>, bytes);
        backward<T, V, kKept><<<grid, threads, bytes, stream>>>(x, weight, rstd, dy, rows, D, dx, d_weight);
      },
      x, weight, dy, dx, d_weight);
}

template void rms_norm_forward(const float*, const float*, float, std::int64_t, std::int64_t, std::int64_t,
                               float*, float*, cudaStream_t);
template void rms_norm_forward(const Bfloat16*, const float*, float, std::int64_t, std::int64_t, std::int64_t,
                               Bfloat16*, float*, cudaStream_t);
template void rms_norm_backward(const float*, const float*, const float*, const float*, std::int64_t,
                                std::int64_t, std::int64_t, std::int64_t, float*, float*, cudaStream_t);
template void rms_norm_backward(const Bfloat16*, const float*, const float*, const Bfloat16*, std::int64_t,
                                std::int64_t, std::int64_t, std::int64_t, Bfloat16*, float*, cudaStream_t);

}  // namespace megalodon::ops::cuda
