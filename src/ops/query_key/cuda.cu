#include "ops/query_key/cuda.h"

#include <cmath>

#include "ops/cuda_device.h"
#include "ops/rope/cuda_rotation.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kWarps = 8;

// A warp takes a head of a token, then that of another token; a lane has the pairs of features lane, lane +
// 32, ... P of them at most. blockIdx.y is the head.
struct Call {
  std::int64_t tokens, L, H, dz, chunk;
  double log2_base;
  float eps, scale;  // scale = 1/sqrt(dz)
};

__device__ std::int64_t position_of(const Call& c, const std::int64_t* start, std::int64_t token) {
  const std::int64_t p = start[token / c.L] + token % c.L;
  return c.chunk > 0 ? p % c.chunk : p;
}

template <class T>
__device__ float2 load_pair(const T* from) {
  float v[2];
  load(from, v);
  return {v[0], v[1]};
}
template <class T>
__device__ void store_pair(float2 pair, T* to) {
  const float v[2] = {pair.x, pair.y};
  store(v, to);
}

// z of this lane, and 1/sqrt(mean(z^2) + eps) of the head.
template <int P, class T>
__device__ float load_head(const Call& c, const T* z, float2 (&v)[P]) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const std::int64_t pair = threadIdx.x % 32 + 32 * i;
    v[i] = 2 * pair < c.dz ? load_pair(z + 2 * pair) : float2{0, 0};
    squares += v[i].x * v[i].x + v[i].y * v[i].y;
  }
  return 1 / sqrtf(warp_sum(squares) / static_cast<float>(c.dz) + c.eps);
}

template <int P, class T>
__global__ void forward(Call c, const T* z, const float* gamma, const float* beta, const std::int64_t* start,
                        T* q, T* k) {
  const std::int64_t h = blockIdx.y, lane = threadIdx.x % 32, Z = c.H * c.dz;
  double frequency[P];
#pragma unroll
  for (int i = 0; i < P; ++i) frequency[i] = rope_frequency(c.log2_base, lane + 32 * i, c.dz);
  const std::int64_t first = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32,
                     step = std::int64_t{gridDim.x} * kWarps;
  for (std::int64_t token = first; token < c.tokens; token += step) {
    const std::int64_t row = (token * c.H + h) * c.dz, position = position_of(c, start, token);
    float2 v[P];
    const float r = load_head(c, z + row, v);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const std::int64_t at = 2 * (lane + 32 * i), column = h * c.dz + at;
      if (at >= c.dz) break;
      const float2 turn = rotation(position, frequency[i]);
      const auto affine = [&](std::int64_t part) -> float2 {
        const float2 g = load_pair(gamma + part * Z + column), b = load_pair(beta + part * Z + column);
        return {v[i].x * r * ((1 + g.x) * c.scale) + b.x, v[i].y * r * ((1 + g.y) * c.scale) + b.y};
      };
      store_pair(rotate(affine(0), turn), q + row + at);
      store_pair(rotate(affine(1), turn), k + row + at);
    }
  }
}

// With n = z r and g the gradient of n: dz = r (g - n mean(g n)).
template <int P, class T>
__global__ void backward(Call c, const T* z, const float* gamma, const std::int64_t* start, const T* dq,
                         const T* dk, T* dz, float* sums) {
  const std::int64_t h = blockIdx.y, lane = threadIdx.x % 32, Z = c.H * c.dz;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  double frequency[P];
  float2 total[P][4] = {};  // gradients of gamma_q, gamma_k, beta_q, beta_k
#pragma unroll
  for (int i = 0; i < P; ++i) frequency[i] = rope_frequency(c.log2_base, lane + 32 * i, c.dz);
  const std::int64_t first = std::int64_t{blockIdx.x} * kWarps + warp,
                     step = std::int64_t{gridDim.x} * kWarps;
  for (std::int64_t token = first; token < c.tokens; token += step) {
    const std::int64_t row = (token * c.H + h) * c.dz, position = position_of(c, start, token);
    float2 v[P], g[P];
    const float r = load_head(c, z + row, v);
    float product = 0;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const std::int64_t at = 2 * (lane + 32 * i), column = h * c.dz + at;
      g[i] = {0, 0};
      if (at >= c.dz) break;
      const float2 turn = rotation(position, frequency[i]), n{v[i].x * r, v[i].y * r};
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const float2 d = rotate_back(load_pair((part == 0 ? dq : dk) + row + at), turn);
        const float2 weight = load_pair(gamma + part * Z + column);
        g[i].x += d.x * ((1 + weight.x) * c.scale), g[i].y += d.y * ((1 + weight.y) * c.scale);
        total[i][part].x += d.x * n.x * c.scale, total[i][part].y += d.y * n.y * c.scale;
        total[i][2 + part].x += d.x, total[i][2 + part].y += d.y;
      }
      product += g[i].x * n.x + g[i].y * n.y;
    }
    const float mean = warp_sum(product) / static_cast<float>(c.dz);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const std::int64_t at = 2 * (lane + 32 * i);
      if (at < c.dz)
        store_pair({r * (g[i].x - v[i].x * r * mean), r * (g[i].y - v[i].y * r * mean)}, dz + row + at);
    }
  }
  __shared__ float2 of_warp[kWarps][32];
  for (int part = 0; part < 4; ++part) {
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const std::int64_t at = 2 * (lane + 32 * i);
      of_warp[warp][lane] = total[i][part];
      __syncthreads();
      if (warp == 0 && at < c.dz) {
        float2 sum{0, 0};
        for (int w = 0; w < kWarps; ++w) sum.x += of_warp[w][lane].x, sum.y += of_warp[w][lane].y;
        store_pair(sum, sums + (std::int64_t{blockIdx.x} * 4 + part) * Z + h * c.dz + at);
      }
      __syncthreads();
    }
  }
}

Call call_of(const QueryKeySizes& s) {
  return {s.B * s.L,
          s.L,
          s.H,
          s.dz,
          s.chunk,
          std::log2(s.rope_base),
          static_cast<float>(s.eps),
          static_cast<float>(1 / std::sqrt(static_cast<double>(s.dz)))};
}

// f(Width<P>{}) with P pairs a lane.
template <class F>
void with_pairs(std::int64_t dz, F&& f) {
  const std::int64_t pairs = ceil_div(dz, 64);
  if (pairs <= 1) return f(Width<1>{});
  if (pairs <= 2) return f(Width<2>{});
  if (pairs <= 4) return f(Width<4>{});
  f(Width<kMostQueryKeyFeatures / 64>{});
}

}  // namespace

template <class T>
void query_key_forward(const QueryKeySizes& sizes, const T* z, const float* gamma, const float* beta,
                       const std::int64_t* start, T* q, T* k, cudaStream_t stream) {
  const Call c = call_of(sizes);
  if (c.tokens * c.H == 0) return;
  // Several tokens a warp, since frequencies cost as much as a token.
  const dim3 grid(grid_size(ceil_div(c.tokens, kWarps), 512), static_cast<unsigned>(c.H));
  with_pairs(c.dz, [&]<int P>(Width<P>) {
    forward<P><<<grid, 32 * kWarps, 0, stream>>>(c, z, gamma, beta, start, q, k);
  });
}

template <class T>
void query_key_backward(const QueryKeySizes& sizes, const T* z, const float* gamma, const std::int64_t* start,
                        const T* dq, const T* dk, std::int64_t blocks, T* dz, float* sums,
                        cudaStream_t stream) {
  const Call c = call_of(sizes);
  if (c.tokens * c.H == 0) return;
  const dim3 grid(grid_size(blocks), static_cast<unsigned>(c.H));
  with_pairs(c.dz, [&]<int P>(Width<P>) {
    backward<P><<<grid, 32 * kWarps, 0, stream>>>(c, z, gamma, start, dq, dk, dz, sums);
  });
}

template void query_key_forward(const QueryKeySizes&, const float*, const float*, const float*,
                                const std::int64_t*, float*, float*, cudaStream_t);
template void query_key_forward(const QueryKeySizes&, const Bfloat16*, const float*, const float*,
                                const std::int64_t*, Bfloat16*, Bfloat16*, cudaStream_t);
template void query_key_backward(const QueryKeySizes&, const float*, const float*, const std::int64_t*,
                                 const float*, const float*, std::int64_t, float*, float*, cudaStream_t);
template void query_key_backward(const QueryKeySizes&, const Bfloat16*, const float*, const std::int64_t*,
                                 const Bfloat16*, const Bfloat16*, std::int64_t, Bfloat16*, float*,
                                 cudaStream_t);

}  // namespace megalodon::ops::cuda
