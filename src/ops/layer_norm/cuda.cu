#include "ops/cuda_rows.h"
#include "ops/cuda_step.h"
#include "ops/layer_norm/cuda.h"

namespace megalodon::ops::cuda {
namespace {

// Sums are taken of x less an origin, the mean of a row's first V numbers: of any row that lies within
// sqrt(D / V) deviations of its mean, so that the variance loses little, and one sum over the block serves
// both. `rest` is the mean's rounding.
template <class T, int V, bool kKept, int kRows>
__global__ void __launch_bounds__(kMostRowThreads)
    forward(const T* x, const float* weight, const float* bias, float eps, std::int64_t rows, std::int64_t D,
            T* y, float* mean, float* rstd) {
  if constexpr (kRows == 1) let_next_start();
  extern __shared__ uint4 shared[];
  const std::int64_t first = std::int64_t{blockIdx.x} * kRows;
  float v[V], origin[kRows] = {}, sums[2 * kRows] = {};
  prefetch_columns<V, kKept>(rows, D, weight);
  prefetch_columns<V, kKept>(rows, D, bias);
  wait_for_previous();
  const ColumnNumbers<V, kKept> weights(weight, D), biases(bias, D);
  Pack<T, V> beginning[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) beginning[r] = load_pack<V>(x + min(first + r, rows - 1) * D);
  const auto tile = read_rows<T, V, kKept, kRows>(x, rows, D, first, shared);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    unpack(beginning[r], v);
#pragma unroll
    for (int j = 0; j < V; ++j) origin[r] += v[j] / V;
  }
  const float scale = 1 / static_cast<float>(D);
  for_columns<V, kKept>(D, [&](std::int64_t i) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      tile.read(r, i, v);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float u = v[j] - origin[r];
        sums[r] += u, sums[kRows + r] += u * u;
      }
    }
  });
  block_sum(sums);
  float m[kRows], rest[kRows], root[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float shift = sums[r] * scale;
    m[r] = origin[r] + shift;
    rest[r] = shift - (m[r] - origin[r]);
    root[r] = 1 / sqrtf(fmaxf(0, sums[kRows + r] * scale - shift * shift) + eps);
    if (threadIdx.x == 0 && first + r < rows) mean[first + r] = m[r], rstd[first + r] = root[r];
  }
  for_columns<V, kKept>(D, [&](std::int64_t i) {
    float w[V], b[V];
    weights.read(i, w), biases.read(i, b);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= rows) break;
      tile.read(r, i, v);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] = (v[j] - m[r] - rest[r]) * root[r] * (1 + w[j]) + b[j];
      store(v, y + (first + r) * D + i);
    }
  });
}

// With u = x - mean - rest and h = dy (1 + weight):
//   dx = rstd (h - mean(h)) - rstd^3 u mean(h u),   d_weight = sum of dy u rstd,   d_bias = sum of dy.
// h is rounded once: what is taken off it must not find a product that the compiler kept exact.
template <class T, int V, bool kKept>
__global__ void __launch_bounds__(kMostRowThreads)
    backward(const T* x, const float* weight, const float* mean, const float* rstd, const T* dy,
             std::int64_t rows, std::int64_t D, T* dx, float* sums) {
  extern __shared__ uint4 shared[];
  const float scale = 1 / static_cast<float>(D);
  ColumnTotals<2, V, kKept> columns(reinterpret_cast<float*>(shared), D);
  for_row_tiles<T, V, kKept>(
      x, dy, rows, D, shared, [&](std::int64_t first, const auto& x_tile, const auto& dy_tile) {
        float m[kTileRows], root[kTileRows];
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) {
          const std::int64_t row = min(first + r, rows - 1);
          m[r] = mean[row], root[r] = rstd[row];
        }
        float w[V] = {}, v[V], d[V], totals[3 * kTileRows] = {};  // of u + rest, h and their product
        for_columns<V, kKept>(D, [&](std::int64_t i) {
          if (weight != nullptr) load(weight + i, w);
#pragma unroll
          for (int r = 0; r < kTileRows; ++r) {
            x_tile.read(r, i, v);
            dy_tile.read(r, i, d);
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const float h = fmaf(d[j], w[j], d[j]);
              totals[3 * r] += v[j] - m[r], totals[3 * r + 1] += h, totals[3 * r + 2] += h * (v[j] - m[r]);
            }
          }
        });
        block_sum(totals);
        for_columns<V, kKept>(D, [&](std::int64_t i) {
          if (weight != nullptr) load(weight + i, w);
#pragma unroll
          for (int r = 0; r < kTileRows; ++r) {
            if (first + r >= rows) break;
            const float rest = totals[3 * r] * scale, mean_h = totals[3 * r + 1] * scale;
            const float pull = root[r] * root[r] * (totals[3 * r + 2] - rest * totals[3 * r + 1]) * scale;
            x_tile.read(r, i, v);
            dy_tile.read(r, i, d);
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const float u = v[j] - m[r] - rest;
              if (weight != nullptr) columns.add(0, i, j, d[j] * (u * root[r])), columns.add(1, i, j, d[j]);
              d[j] = root[r] * (fmaf(d[j], w[j], d[j]) - mean_h - u * pull);
            }
            store(d, dx + (first + r) * D + i);
          }
        });
      });
  if (weight != nullptr) columns.store(sums + std::int64_t{blockIdx.x} * 2 * D);
}

}  // namespace

template <class T>
void layer_norm_forward(const T* x, const float* weight, const float* bias, float eps, std::int64_t rows,
                        std::int64_t D, T* y, float* mean, float* rstd, cudaStream_t stream) {
  if (rows == 0) return;
  with_row_layout<T>(
      D, 1, 0,
      [&]<int V, bool kKept>(unsigned threads, std::size_t bytes) {
        with_rows_of_block(rows, [&]<int kRows>(Width<kRows>) {
          allow_shared_memory(forward<T, V, kKept, kRows>, bytes);
          const dim3 grid(grid_size(ceil_div(rows, kRows)));
          launch_step({grid, threads, bytes, stream}, forward<T, V, kKept, kRows>, x, weight, bias, eps, rows,
                      D, y, mean, rstd);
        });
      },
      x, weight, bias, y);
}

template <class T>
void layer_norm_backward(const T* x, const float* weight, const float* mean, const float* rstd, const T* dy,
                         std::int64_t rows, std::int64_t D, std::int64_t blocks, T* dx, float* sums,
                         cudaStream_t stream) {
  if (rows == 0) return;
  with_row_layout<T>(
      D, 4, 2,
      [&]<int V, bool kKept>(unsigned threads, std::size_t bytes) {
        allow_shared_memory(backward<T, V, kKept>, bytes);
        backward<T, V, kKept>
            <<<grid_size(blocks), threads, bytes, stream>>>(x, weight, mean, rstd, dy, rows, D, dx, sums);
      },
      x, weight, dy, dx, sums);
}

template void layer_norm_forward(const float*, const float*, const float*, float, std::int64_t, std::int64_t,
                                 float*, float*, float*, cudaStream_t);
template void layer_norm_forward(const Bfloat16*, const float*, const float*, float, std::int64_t,
                                 std::int64_t, Bfloat16*, float*, float*, cudaStream_t);
template void layer_norm_backward(const float*, const float*, const float*, const float*, const float*,
                                  std::int64_t, std::int64_t, std::int64_t, float*, float*, cudaStream_t);
template void layer_norm_backward(const Bfloat16*, const float*, const float*, const float*, const Bfloat16*,
                                  std::int64_t, std::int64_t, std::int64_t, Bfloat16*, float*, cudaStream_t);

}  // namespace megalodon::ops::cuda
