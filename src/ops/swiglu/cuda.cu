#include "ops/swiglu/cuda.h"

#include <numeric>

#include "ops/cuda_device.h"
#include "ops/swiglu/cuda_sigmoid.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;

// Where a thread's first column of its row is.
struct Place {
  std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y, column;

  __device__ explicit Place(int width)
      : column((std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * width) {}
};

template <class T, int V>
__global__ void forward(const SwigluInputs<T> x, T* y) {
  const Place place(V);
  if (place.row >= x.R || place.column >= x.F) return;
  const std::int64_t i = place.row * x.step + place.column;
  float a_i[V], b_i[V], y_i[V];
  load(x.a + i, a_i);
  if (x.b != nullptr) load(x.b + i, b_i);
#pragma unroll
  for (int j = 0; j < V; ++j) y_i[j] = a_i[j] * sigmoid(a_i[j]) * (x.b != nullptr ? b_i[j] : 1);
  store(y_i, y + place.row * x.F + place.column);
}

// Of V elements: d silu(a)/da = s + silu (1 - s) with s = sigmoid(a). y is that of the forward kernel, bit
// for bit. da stays in da_i too.
template <class T, int V>
__device__ void differentiate(const SwigluInputs<T>& x, const SwigluGradients<T>& d, std::int64_t row,
                              std::int64_t column, float (&da_i)[V]) {
  const std::int64_t i = row * x.step + column, to = row * d.step + column, flat = row * x.F + column;
  float a_i[V], b_i[V], dy_i[V], db_i[V], y_i[V];
  load(x.a + i, a_i);
  load(d.dy + flat, dy_i);
  if (x.b != nullptr) load(x.b + i, b_i);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float s = sigmoid(a_i[j]), silu = a_i[j] * s, factor = x.b != nullptr ? b_i[j] : 1;
    db_i[j] = dy_i[j] * silu;
    da_i[j] = dy_i[j] * factor * (s + silu * (1 - s));
    y_i[j] = silu * factor;
  }
  store(da_i, d.da + to);
  if (x.b != nullptr) store(db_i, d.db + to);
  if (d.y != nullptr) store(y_i, d.y + flat);
}

template <class T, int V>
__global__ void backward(const SwigluInputs<T> x, const SwigluGradients<T> d) {
  const Place place(V);
  float da_i[V];
  if (place.row < x.R && place.column < x.F) differentiate(x, d, place.row, place.column, da_i);
}

// A block takes `rows` rows of V kThreads columns, a thread V columns: it sums da over them.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    backward_with_sums(const SwigluInputs<T> x, const SwigluGradients<T> d, std::int64_t rows, float* sums) {
  const std::int64_t column = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  if (column >= x.F) return;
  const std::int64_t first = blockIdx.y * rows, last = min(first + rows, x.R);
  float sum[V] = {};
#pragma unroll 1  // the warps of a multiprocessor have loads enough under way
  for (std::int64_t row = first; row < last; ++row) {
    float da_i[V];
    differentiate(x, d, row, column, da_i);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += da_i[j];
  }
  store(sum, sums + blockIdx.y * x.F + column);
}

// Calls f(Width<V>{}, grid, block) for all elements, V of a row a thread: blocks of equal parts of long rows,
// or of several short ones.
template <class T, class F, class... P>
void with_layout(const SwigluInputs<T>& x, std::int64_t steps, F&& f, const P*... pointers) {
  // A divisor of a pack divides all of these if it divides what they have in common.
  with_pack_width<T>(
      std::gcd(x.F, std::gcd(x.step, steps)),
      [&]<int V>(Width<V> width) {
        const std::int64_t packs = ceil_div(x.F, V), parts = ceil_div(packs, kThreads);
        const std::int64_t across = parts == 1 ? packs : ceil_div(packs, 32 * parts) * 32;
        const dim3 block(static_cast<unsigned>(across), static_cast<unsigned>(kThreads / across));
        f(width, dim3(grid_size(ceil_div(x.R, block.y)), grid_size(parts)), block);
      },
      x.a, x.b, pointers...);
}

}  // namespace

template <class T>
void swiglu_forward(const SwigluInputs<T>& x, T* y, cudaStream_t stream) {
  if (x.R * x.F == 0) return;
  with_layout(
      x, 0, [&]<int V>(Width<V>, dim3 grid, dim3 block) { forward<T, V><<<grid, block, 0, stream>>>(x, y); },
      y);
}

template <class T>
void swiglu_backward(const SwigluInputs<T>& x, const SwigluGradients<T>& d, cudaStream_t stream) {
  if (x.R * x.F == 0) return;
  with_layout(
      x, d.step,
      [&]<int V>(Width<V>, dim3 grid, dim3 block) { backward<T, V><<<grid, block, 0, stream>>>(x, d); }, d.dy,
      d.da, d.db, d.y);
}

template <class T>
void swiglu_backward_with_sums(const SwigluInputs<T>& x, const SwigluGradients<T>& d, std::int64_t rows,
                               float* sums, cudaStream_t stream) {
  if (x.R * x.F == 0) return;
  with_layout(
      x, d.step,
      [&]<int V>(Width<V>, dim3, dim3) {
        const dim3 grid(grid_size(ceil_div(x.F, kThreads * V)), grid_size(ceil_div(x.R, rows)));
        backward_with_sums<T, V><<<grid, kThreads, 0, stream>>>(x, d, rows, sums);
      },
      d.dy, d.da, d.db, d.y);
}

template void swiglu_forward(const SwigluInputs<float>&, float*, cudaStream_t);
template void swiglu_forward(const SwigluInputs<Bfloat16>&, Bfloat16*, cudaStream_t);
template void swiglu_backward(const SwigluInputs<float>&, const SwigluGradients<float>&, cudaStream_t);
template void swiglu_backward(const SwigluInputs<Bfloat16>&, const SwigluGradients<Bfloat16>&, cudaStream_t);
template void swiglu_backward_with_sums(const SwigluInputs<float>&, const SwigluGradients<float>&,
                                        std::int64_t, float*, cudaStream_t);
template void swiglu_backward_with_sums(const SwigluInputs<Bfloat16>&, const SwigluGradients<Bfloat16>&,
                                        std::int64_t, float*, cudaStream_t);

}  // namespace megalodon::ops::cuda
