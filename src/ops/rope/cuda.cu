#include "ops/rope/cuda.h"

#include <cmath>

#include "ops/cuda_device.h"
#include "ops/rope/cuda_rotation.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;

// A thread takes one pair of features in all heads of a token.
template <class T>
__global__ void turn(const T* x, const std::int64_t* start, std::int64_t tokens, std::int64_t L,
                     std::int64_t H, std::int64_t d, std::int64_t chunk, double log2_base, bool inverse,
                     T* y) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x, half = d / 2;
  if (i >= tokens * half) return;
  const std::int64_t token = i / half, pair = i % half, position = start[token / L] + token % L;
  float2 r = rotation(chunk > 0 ? position % chunk : position, rope_frequency(log2_base, pair, d));
  if (inverse) r.y = -r.y;
  for (std::int64_t h = 0; h < H; ++h) {
    const std::int64_t at = (token * H + h) * d + 2 * pair;
    float v[2];
    load(x + at, v);
    const float2 turned = rotate({v[0], v[1]}, r);
    v[0] = turned.x, v[1] = turned.y;
    store(v, y + at);
  }
}

}  // namespace

template <class T>
void rope(const T* x, const std::int64_t* start, std::int64_t B, std::int64_t L, std::int64_t H,
          std::int64_t d, std::int64_t chunk, double base, bool inverse, T* y, cudaStream_t stream) {
  const std::int64_t pairs = B * L * (d / 2);
  if (pairs == 0) return;
  turn<<<grid_size(ceil_div(pairs, kThreads)), kThreads, 0, stream>>>(x, start, B * L, L, H, d, chunk,
                                                                      std::log2(base), inverse, y);
}

template void rope(const float*, const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                   std::int64_t, double, bool, float*, cudaStream_t);
template void rope(const Bfloat16*, const std::int64_t*, std::int64_t, std::int64_t, std::int64_t,
                   std::int64_t, std::int64_t, double, bool, Bfloat16*, cudaStream_t);

}  // namespace megalodon::ops::cuda
