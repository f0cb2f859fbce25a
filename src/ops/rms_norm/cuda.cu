#include "ops/cuda_device.h"
#include "ops/rms_norm/cuda.h"

namespace megalodon::ops::cuda {
namespace {

// A block a row. A thread has the same columns in every pass, and the second finds them in the cache.
template <class T, int V>
__global__ void forward(const T* x, const float* weight, float eps, std::int64_t D, T* y, float* rstd) {
  const std::int64_t row = blockIdx.x, step = std::int64_t{blockDim.x} * V, first = threadIdx.x * V;
  x += row * D, y += row * D;
  float sums[1] = {0};
  for (std::int64_t i = first; i < D; i += step) {
    float v[V];
    load(x + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) sums[0] += v[j] * v[j];
  }
  block_sum(sums);
  const float r = 1 / sqrtf(sums[0] / static_cast<float>(D) + eps);
  if (threadIdx.x == 0) rstd[row] = r;
  for (std::int64_t i = first; i < D; i += step) {
    float v[V];
    load(x + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] *= weight != nullptr ? r * (1 + weight[i + j]) : r;
    store(v, y + i);
  }
}

// With g = dy (1 + weight) and r = rstd: dx = r (g - x r^2 mean(g x)), d_weight = sum of dy x r over the
// rows.
template <class T, int V>
__global__ void backward(const T* x, const float* weight, const float* rstd, const T* dy, std::int64_t rows,
                         std::int64_t D, T* dx, float* d_weight) {
  extern __shared__ float columns[];  // [D], each thread's own
  const std::int64_t step = std::int64_t{blockDim.x} * V, first = threadIdx.x * V;
  if (weight != nullptr) {
    for (std::int64_t i = first; i < D; i += step)
      for (int j = 0; j < V; ++j) columns[i + j] = 0;
  }
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T *const x_row = x + row * D, *const dy_row = dy + row * D;
    const float r = rstd[row];
    float sums[1] = {0};
    for (std::int64_t i = first; i < D; i += step) {
      float v[V], d[V];
      load(x_row + i, v);
      load(dy_row + i, d);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sums[0] += v[j] * d[j] * (weight != nullptr ? 1 + weight[i + j] : 1);
        if (weight != nullptr) columns[i + j] += d[j] * v[j] * r;
      }
    }
    block_sum(sums);
    const float pull = r * r * sums[0] / static_cast<float>(D);
    for (std::int64_t i = first; i < D; i += step) {
      float v[V], d[V];
      load(x_row + i, v);
      load(dy_row + i, d);
#pragma unroll
      for (int j = 0; j < V; ++j)
        d[j] = r * (d[j] * (weight != nullptr ? 1 + weight[i + j] : 1) - v[j] * pull);
      store(d, dx + row * D + i);
    }
  }
  if (weight != nullptr) {
    for (std::int64_t i = first; i < D; i += step)
      for (int j = 0; j < V; ++j) d_weight[std::int64_t{blockIdx.x} * D + i + j] = columns[i + j];
  }
}

}  // namespace

template <class T>
void rms_norm_forward(const T* x, const float* weight, float eps, std::int64_t rows, std::int64_t D, T* y,
                      float* rstd, cudaStream_t stream) {
  if (rows == 0) return;
  with_pack_width<T>(
      D,
      [&]<int V>(Width<V>) {
        forward<T, V>
            <<<grid_size(rows), threads_for(ceil_div(D, V)), 0, stream>>>(x, weight, eps, D, y, rstd);
      },
      x, y);
}

template <class T>
void rms_norm_backward(const T* x, const float* weight, const float* rstd, const T* dy, std::int64_t rows,
                       std::int64_t D, std::int64_t blocks, T* dx, float* d_weight, cudaStream_t stream) {
  if (rows == 0) return;
  with_pack_width<T>(
      D,
      [&]<int V>(Width<V>) {
        const auto shared = weight != nullptr ? static_cast<std::size_t>(D) * sizeof(float) : 0;
        allow_shared_memory(backward<T, V>, shared);
        backward<T, V><<<grid_size(blocks), threads_for(ceil_div(D, V)), shared, stream>>>(
            x, weight, rstd, dy, rows, D, dx, d_weight);
      },
      x, dy, dx);
}

template void rms_norm_forward(const float*, const float*, float, std::int64_t, std::int64_t, float*, float*,
                               cudaStream_t);
template void rms_norm_forward(const Bfloat16*, const float*, float, std::int64_t, std::int64_t, Bfloat16*,
                               float*, cudaStream_t);
template void rms_norm_backward(const float*, const float*, const float*, const float*, std::int64_t,
                                std::int64_t, std::int64_t, float*, float*, cudaStream_t);
template void rms_norm_backward(const Bfloat16*, const float*, const float*, const Bfloat16*, std::int64_t,
                                std::int64_t, std::int64_t, Bfloat16*, float*, cudaStream_t);

}  // namespace megalodon::ops::cuda
