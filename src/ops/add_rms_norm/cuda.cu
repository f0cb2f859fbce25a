#include "ops/add_rms_norm/cuda.h"

#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kPacks = 4;  // of a row, that a thread holds in registers
constexpr int kMostThreads = 512;

// A block is blockDim.y rows of blockDim.x threads; of more threads than a warp there is one row.
__device__ float sum_of_row(float x) {
  if (blockDim.x == 32) return warp_sum(x);
  float sums[1] = {x};
  block_sum(sums);
  return sums[0];
}

// f(pack, column) for this thread's columns.
template <int V, class F>
__device__ void for_packs(std::int64_t D, F&& f) {
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const std::int64_t column = (std::int64_t{i} * blockDim.x + threadIdx.x) * V;
    if (column < D) f(i, column);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kMostThreads)
    forward(const float* x, const T* added, const float* factor, float eps, std::int64_t rows, std::int64_t D,
            float* sum, T* normal, float* rstd) {
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  float h[kPacks][V], more[kPacks][V] = {}, f[kPacks][V];
  for_packs<V>(D, [&](int i, std::int64_t column) {
    load(x + row * D + column, h[i]);
    if (added != nullptr) load(added + row * D + column, more[i]);
    load(factor + column, f[i]);
  });
  if (added != nullptr) {
    for_packs<V>(D, [&](int i, std::int64_t column) {
#pragma unroll
      for (int j = 0; j < V; ++j) h[i][j] += more[i][j];
      store(h[i], sum + row * D + column);
    });
  }
  float squares = 0;
  for_packs<V>(D, [&](int i, std::int64_t) {
#pragma unroll
    for (int j = 0; j < V; ++j) squares += h[i][j] * h[i][j];
  });
  const float r = 1 / sqrtf(sum_of_row(squares) / static_cast<float>(D) + eps);
  if (threadIdx.x == 0) rstd[row] = r;
  for_packs<V>(D, [&](int i, std::int64_t column) {
#pragma unroll
    for (int j = 0; j < V; ++j) f[i][j] *= h[i][j] * r;
    store(f[i], normal + row * D + column);
  });
}

// With h = sum, g = d_normal factor and r = rstd: dx = d_sum + r (g - h r^2 mean(g h)), d_factor = sum of
// d_normal h r over the rows.
template <class T, int V>
__global__ void __launch_bounds__(kMostThreads)
    backward(const float* sum, const float* factor, const float* rstd, const float* d_sum, const T* d_normal,
             std::int64_t rows, std::int64_t D, float* dx, T* d_added, float* d_factor) {
  extern __shared__ float of_rows[];  // [blockDim.y, D]
  float f[kPacks][V], columns[kPacks][V] = {};
  for_packs<V>(D, [&](int i, std::int64_t column) { load(factor + column, f[i]); });
  for (std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows;
       row += std::int64_t{gridDim.x} * blockDim.y) {
    float h[kPacks][V], g[kPacks][V], d[kPacks][V] = {};
    for_packs<V>(D, [&](int i, std::int64_t column) {
      load(sum + row * D + column, h[i]);
      load(d_normal + row * D + column, g[i]);
      if (d_sum != nullptr) load(d_sum + row * D + column, d[i]);
    });
    const float r = rstd[row];
    float products = 0;
    for_packs<V>(D, [&](int i, std::int64_t) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        columns[i][j] += g[i][j] * h[i][j] * r;
        g[i][j] *= f[i][j];
        products += g[i][j] * h[i][j];
      }
    });
    const float pull = r * r * sum_of_row(products) / static_cast<float>(D);
    for_packs<V>(D, [&](int i, std::int64_t column) {
#pragma unroll
      for (int j = 0; j < V; ++j) d[i][j] += r * (g[i][j] - h[i][j] * pull);
      store(d[i], dx + row * D + column);
      if (d_added != nullptr) store(d[i], d_added + row * D + column);
    });
  }
  for_packs<V>(D, [&](int i, std::int64_t column) { store(columns[i], of_rows + threadIdx.y * D + column); });
  __syncthreads();
  for (std::int64_t i = threadIdx.y * blockDim.x + threadIdx.x; i < D; i += blockDim.x * blockDim.y) {
    float total = 0;
    for (unsigned y = 0; y < blockDim.y; ++y) total += of_rows[y * D + i];
    d_factor[std::int64_t{blockIdx.x} * D + i] = total;
  }
}

// Threads of a row, and rows of a block.
dim3 block_for(std::int64_t D, int V) {
  const auto threads = static_cast<unsigned>(ceil_div(D, std::int64_t{32} * V * kPacks) * 32);
  return {threads, threads == 32 ? 8u : 1u};
}

template <class F>
void with_width(std::int64_t D, F&& f) {
  if (D % 4 == 0) {
    f(Width<4>{});
  } else {
    f(Width<1>{});
  }
}

}  // namespace

template <class T>
void add_rms_norm_forward(const float* x, const T* added, const float* factor, float eps, std::int64_t rows,
                          std::int64_t D, float* sum, T* normal, float* rstd, cudaStream_t stream) {
  if (rows == 0) return;
  with_width(D, [&]<int V>(Width<V>) {
    const auto block = block_for(D, V);
    forward<T, V><<<grid_size(ceil_div(rows, block.y)), block, 0, stream>>>(x, added, factor, eps, rows, D,
                                                                            sum, normal, rstd);
  });
}

template <class T>
void add_rms_norm_backward(const float* sum, const float* factor, const float* rstd, const float* d_sum,
                           const T* d_normal, std::int64_t rows, std::int64_t D, std::int64_t blocks,
                           float* dx, T* d_added, float* d_factor, cudaStream_t stream) {
  with_width(D, [&]<int V>(Width<V>) {
    const auto block = block_for(D, V);
    const auto shared = static_cast<std::size_t>(block.y * D) * sizeof(float);
    backward<T, V><<<grid_size(blocks), block, shared, stream>>>(sum, factor, rstd, d_sum, d_normal, rows, D,
                                                                 dx, d_added, d_factor);
  });
}

template void add_rms_norm_forward(const float*, const float*, const float*, float, std::int64_t,
                                   std::int64_t, float*, float*, float*, cudaStream_t);
template void add_rms_norm_forward(const float*, const Bfloat16*, const float*, float, std::int64_t,
                                   std::int64_t, float*, Bfloat16*, float*, cudaStream_t);
template void add_rms_norm_backward(const float*, const float*, const float*, const float*, const float*,
                                    std::int64_t, std::int64_t, std::int64_t, float*, float*, float*,
                                    cudaStream_t);
template void add_rms_norm_backward(const float*, const float*, const float*, const float*, const Bfloat16*,
                                    std::int64_t, std::int64_t, std::int64_t, float*, Bfloat16*, float*,
                                    cudaStream_t);

}  // namespace megalodon::ops::cuda
