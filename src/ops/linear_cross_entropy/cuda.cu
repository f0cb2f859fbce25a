#include "ops/linear_cross_entropy/cuda.h"

#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int V>
__global__ void scale_elements(T* x, const float* scale, std::int64_t n) {
  const float factor = *scale;
  if (factor == 1) return;
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads * V;
  for (std::int64_t i = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V; i < n; i += step) {
    float x_i[V];
    load(x + i, x_i);
#pragma unroll
    for (int j = 0; j < V; ++j) x_i[j] *= factor;
    store(x_i, x + i);
  }
}

}  // namespace

template <class T>
void scale(T* x, const float* scale, std::int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  with_pack_width<T>(
      n,
      [&]<int V>(Width<V>) {
        const auto blocks = grid_size(ceil_div(n, kThreads * V), 8 * multiprocessors());
        scale_elements<T, V><<<blocks, kThreads, 0, stream>>>(x, scale, n);
      },
      x);
}

template void scale(float*, const float*, std::int64_t, cudaStream_t);
template void scale(Bfloat16*, const float*, std::int64_t, cudaStream_t);

}  // namespace megalodon::ops::cuda
