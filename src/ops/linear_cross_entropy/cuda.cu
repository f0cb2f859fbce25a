#include "ops/linear_cross_entropy/cuda.h"

#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int V>
__global__ void scale_elements(const T* x, const float* scale, std::int64_t n, T* y) {
  const std::int64_t i = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  if (i >= n) return;
  float x_i[V];
  load(x + i, x_i);
#pragma unroll
  for (int j = 0; j < V; ++j) x_i[j] *= *scale;
  store(x_i, y + i);
}

}  // namespace

template <class T>
void scaled(const T* x, const float* scale, std::int64_t n, T* y, cudaStream_t stream) {
  if (n == 0) return;
  with_pack_width<T>(
      n,
      [&]<int V>(Width<V>) {
        scale_elements<T, V><<<grid_size(ceil_div(n, kThreads * V)), kThreads, 0, stream>>>(x, scale, n, y);
      },
      x, y);
}

template void scaled(const float*, const float*, std::int64_t, float*, cudaStream_t);
template void scaled(const Bfloat16*, const float*, std::int64_t, Bfloat16*, cudaStream_t);

}  // namespace megalodon::ops::cuda
