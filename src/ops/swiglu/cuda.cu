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

// d silu(a)/da = s (1 + a (1 - s)) with s = sigmoid(a). y is that of the forward kernel, bit for bit.
template <class T, int V>
__global__ void backward(const T* a, const T* b, const T* dy, T* da, T* db, T* y, std::int64_t n) {
  const std::int64_t i = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  if (i >= n) return;
  float a_i[V], b_i[V], dy_i[V], da_i[V], db_i[V], y_i[V];
  load(a + i, a_i);
  load(dy + i, dy_i);
  if (b != nullptr) load(b + i, b_i);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float s = sigmoid(a_i[j]), silu = a_i[j] * s, factor = b != nullptr ? b_i[j] : 1;
    db_i[j] = dy_i[j] * silu;
    da_i[j] = dy_i[j] * s * (1 + a_i[j] * (1 - s)) * factor;
    y_i[j] = silu * factor;
  }
  store(da_i, da + i);
  if (b != nullptr) store(db_i, db + i);
  if (y != nullptr) store(y_i, y + i);
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
void swiglu_backward(const T* a, const T* b, const T* dy, T* da, T* db, T* y, std::int64_t n,
                     cudaStream_t stream) {
  if (n == 0) return;
  with_pack_width<T>(
      n,
      [&]<int V>(Width<V>) {
        backward<T, V><<<grid_size(ceil_div(n, kThreads * V)), kThreads, 0, stream>>>(a, b, dy, da, db, y, n);
      },
      a, b, dy, da, db, y);
}

template void swiglu_forward(const float*, const float*, float*, std::int64_t, cudaStream_t);
template void swiglu_forward(const Bfloat16*, const Bfloat16*, Bfloat16*, std::int64_t, cudaStream_t);
template void swiglu_backward(const float*, const float*, const float*, float*, float*, float*, std::int64_t,
                              cudaStream_t);
template void swiglu_backward(const Bfloat16*, const Bfloat16*, const Bfloat16*, Bfloat16*, Bfloat16*,
                              Bfloat16*, std::int64_t, cudaStream_t);

}  // namespace megalodon::ops::cuda
