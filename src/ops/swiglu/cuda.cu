#include "ops/swiglu/cuda.h"

#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float sigmoid(float a) {
  return 1 / (1 + __expf(-a));
}

template <class T, int V>
__global__ void forward(const T* a, const T* b, T* y, std::int64_t n) {
  const std::int64_t i = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  if (i >= n) return;
  float a_i[V], b_i[V], y_i[V];
  load(a + i, a_i);
  if (b != nullptr) load(b + i, b_i);
#pragma unroll
  for (int j = 0; j < V; ++j) y_i[j] = a_i[j] * sigmoid(a_i[j]) * (b != nullptr ? b_i[j] : 1);
  store(y_i, y + i);
}

// Of V elements from i on: d silu(a)/da = s (1 + a (1 - s)) with s = sigmoid(a). y is that of the forward
// kernel, bit for bit. da stays in da_i too.
template <class T, int V>
__device__ void differentiate(const SwigluGradient<T>& x, std::int64_t i, float (&da_i)[V]) {
  float a_i[V], b_i[V], dy_i[V], db_i[V], y_i[V];
  load(x.a + i, a_i);
  load(x.dy + i, dy_i);
  if (x.b != nullptr) load(x.b + i, b_i);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float s = sigmoid(a_i[j]), silu = a_i[j] * s, factor = x.b != nullptr ? b_i[j] : 1;
    db_i[j] = dy_i[j] * silu;
    da_i[j] = dy_i[j] * s * (1 + a_i[j] * (1 - s)) * factor;
    y_i[j] = silu * factor;
  }
  store(da_i, x.da + i);
  if (x.b != nullptr) store(db_i, x.db + i);
  if (x.y != nullptr) store(y_i, x.y + i);
}

template <class T, int V>
__global__ void backward(const SwigluGradient<T> x, std::int64_t n) {
  const std::int64_t i = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  float da_i[V];
  if (i < n) differentiate(x, i, da_i);
}

// A block takes `rows` rows of V kThreads columns, a thread V columns: it sums da over them.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    backward_with_sums(const SwigluGradient<T> x, std::int64_t R, std::int64_t F, std::int64_t rows,
                       float* sums) {
  const std::int64_t column = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  if (column >= F) return;
  const std::int64_t first = blockIdx.y * rows, last = min(first + rows, R);
  float sum[V] = {};
#pragma unroll 1  // the warps of a multiprocessor have loads enough under way
  for (std::int64_t row = first; row < last; ++row) {
    float da_i[V];
    differentiate(x, row * F + column, da_i);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += da_i[j];
  }
  store(sum, sums + blockIdx.y * F + column);
}

}  // namespace

template <class T>
void swiglu_forward(const T* a, const T* b, T* y, std::int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  with_pack_width<T>(
      n,
      [&]<int V>(Width<V>) {
        forward<T, V><<<grid_size(ceil_div(n, kThreads * V)), kThreads, 0, stream>>>(a, b, y, n);
      },
      a, b, y);
}

template <class T>
void swiglu_backward(const SwigluGradient<T>& x, std::int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  with_pack_width<T>(
      n,
      [&]<int V>(Width<V>) {
        backward<T, V><<<grid_size(ceil_div(n, kThreads * V)), kThreads, 0, stream>>>(x, n);
      },
      x.a, x.b, x.dy, x.da, x.db, x.y);
}

template <class T>
void swiglu_backward_with_sums(const SwigluGradient<T>& x, std::int64_t R, std::int64_t F, std::int64_t rows,
                               float* sums, cudaStream_t stream) {
  if (R * F == 0) return;
  with_pack_width<T>(
      F,
      [&]<int V>(Width<V>) {
        const dim3 grid(grid_size(ceil_div(F, kThreads * V)), grid_size(ceil_div(R, rows)));
        backward_with_sums<T, V><<<grid, kThreads, 0, stream>>>(x, R, F, rows, sums);
      },
      x.a, x.b, x.dy, x.da, x.db, x.y);
}

template void swiglu_forward(const float*, const float*, float*, std::int64_t, cudaStream_t);
template void swiglu_forward(const Bfloat16*, const Bfloat16*, Bfloat16*, std::int64_t, cudaStream_t);
template void swiglu_backward(const SwigluGradient<float>&, std::int64_t, cudaStream_t);
template void swiglu_backward(const SwigluGradient<Bfloat16>&, std::int64_t, cudaStream_t);
template void swiglu_backward_with_sums(const SwigluGradient<float>&, std::int64_t, std::int64_t,
                                        std::int64_t, float*, cudaStream_t);
template void swiglu_backward_with_sums(const SwigluGradient<Bfloat16>&, std::int64_t, std::int64_t,
                                        std::int64_t, float*, cudaStream_t);

}  // namespace megalodon::ops::cuda
