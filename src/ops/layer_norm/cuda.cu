#include "ops/cuda_device.h"
#include "ops/layer_norm/cuda.h"

namespace megalodon::ops::cuda {
namespace {

// dy (1 + weight), rounded once: what is taken off it must not find a product that the compiler kept exact.
__device__ float scaled(float dy, const float* weight, std::int64_t i) {
  return weight != nullptr ? fmaf(dy, weight[i], dy) : dy;
}

// A block a row. A thread has the same columns in every pass, and the later ones find them in the cache. The
// mean of what is left after the mean is taken off, `rest`, is the mean's rounding.
template <class T, int V>
__global__ void forward(const T* x, const float* weight, const float* bias, float eps, std::int64_t D, T* y,
                        float* mean, float* rstd) {
  const std::int64_t row = blockIdx.x, step = std::int64_t{blockDim.x} * V, first = threadIdx.x * V;
  x += row * D, y += row * D;
  const float scale = 1 / static_cast<float>(D);
  float v[V], sum[1] = {0}, sums[2] = {0, 0};
  for (std::int64_t i = first; i < D; i += step) {
    load(x + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[0] += v[j];
  }
  block_sum(sum);
  const float m = sum[0] * scale;
  for (std::int64_t i = first; i < D; i += step) {
    load(x + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) sums[0] += v[j] - m, sums[1] += (v[j] - m) * (v[j] - m);
  }
  block_sum(sums);
  const float rest = sums[0] * scale, r = 1 / sqrtf(fmaxf(0, sums[1] * scale - rest * rest) + eps);
  if (threadIdx.x == 0) mean[row] = m, rstd[row] = r;
  for (std::int64_t i = first; i < D; i += step) {
    load(x + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      v[j] = (v[j] - m - rest) * r;
      if (weight != nullptr) v[j] = v[j] * (1 + weight[i + j]) + bias[i + j];
    }
    store(v, y + i);
  }
}

// With u = x - mean - rest and h = dy (1 + weight):
//   dx = rstd (h - mean(h)) - rstd^3 u mean(h u),   d_weight = sum of dy u rstd,   d_bias = sum of dy.
template <class T, int V>
__global__ void backward(const T* x, const float* weight, const float* mean, const float* rstd, const T* dy,
                         std::int64_t rows, std::int64_t D, T* dx, float* sums) {
  extern __shared__ float columns[];  // [2, D], each thread's own
  const std::int64_t step = std::int64_t{blockDim.x} * V, first = threadIdx.x * V;
  const float scale = 1 / static_cast<float>(D);
  if (weight != nullptr) {
    for (std::int64_t i = first; i < D; i += step)
      for (int j = 0; j < V; ++j) columns[i + j] = columns[D + i + j] = 0;
  }
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T *const x_row = x + row * D, *const dy_row = dy + row * D;
    const float m = mean[row], r = rstd[row];
    float v[V], d[V], totals[3] = {0, 0, 0};  // of u + rest, h and their product
    for (std::int64_t i = first; i < D; i += step) {
      load(x_row + i, v);
      load(dy_row + i, d);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float h = scaled(d[j], weight, i + j);
        totals[0] += v[j] - m, totals[1] += h, totals[2] += h * (v[j] - m);
      }
    }
    block_sum(totals);
    const float rest = totals[0] * scale, mean_h = totals[1] * scale;
    const float pull = r * r * (totals[2] - rest * totals[1]) * scale;
    for (std::int64_t i = first; i < D; i += step) {
      load(x_row + i, v);
      load(dy_row + i, d);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float u = v[j] - m - rest;
        if (weight != nullptr) columns[i + j] += d[j] * u * r, columns[D + i + j] += d[j];
        d[j] = r * (scaled(d[j], weight, i + j) - mean_h - u * pull);
      }
      store(d, dx + row * D + i);
    }
  }
  if (weight != nullptr) {
    sums += std::int64_t{blockIdx.x} * 2 * D;
    for (std::int64_t i = first; i < D; i += step)
      for (int j = 0; j < V; ++j) sums[i + j] = columns[i + j], sums[D + i + j] = columns[D + i + j];
  }
}

}  // namespace

template <class T>
void layer_norm_forward(const T* x, const float* weight, const float* bias, float eps, std::int64_t rows,
                        std::int64_t D, T* y, float* mean, float* rstd, cudaStream_t stream) {
  if (rows == 0) return;
  with_pack_width<T>(
      D,
      [&]<int V>(Width<V>) {
        forward<T, V><<<grid_size(rows), threads_for(ceil_div(D, V)), 0, stream>>>(x, weight, bias, eps, D, y,
                                                                                   mean, rstd);
      },
      x, y);
}

template <class T>
void layer_norm_backward(const T* x, const float* weight, const float* mean, const float* rstd, const T* dy,
                         std::int64_t rows, std::int64_t D, std::int64_t blocks, T* dx, float* sums,
                         cudaStream_t stream) {
  if (rows == 0) return;
  with_pack_width<T>(
      D,
      [&]<int V>(Width<V>) {
        const auto shared = weight != nullptr ? static_cast<std::size_t>(2 * D) * sizeof(float) : 0;
        allow_shared_memory(backward<T, V>, shared);
        backward<T, V><<<grid_size(blocks), threads_for(ceil_div(D, V)), shared, stream>>>(
            x, weight, mean, rstd, dy, rows, D, dx, sums);
      },
      x, dy, dx);
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
