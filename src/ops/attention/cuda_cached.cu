#include "ops/attention/cuda.h"
#include "ops/cuda_device.h"

// Attention over a cache, a query at a time: a block goes through some of the keys that its query sees,
// kThreads at a time, with the softmax relative to the largest score so far. Where there are few queries the
// keys of each are shared among `splits` blocks, and a second kernel joins their parts.
namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;

struct Query {
  std::int64_t b, t, h, position, first, keys;  // keys: those from position `first` on that it sees

  __device__ Query(const CachedSizes& s, const std::int64_t* start, std::int64_t row)
      : b(row / (s.L * s.H)), t(row / s.H % s.L), h(row % s.H), position(start[b] + t) {
    const std::int64_t chunk = s.chunk > 0 ? position / s.chunk - s.previous_chunks : 0;
    first = chunk > 0 ? chunk * s.chunk : 0;
    keys = position - first + 1;
  }
};

// Row of key or value `position` of a query's head: in this call's arrays [B, L, Hkv, d] or in the cache [B,
// C, Hkv, d].
template <class T>
__device__ const T* row_of(const CachedSizes& s, const Query& q, std::int64_t position, std::int64_t d,
                           const T* here, const T* cache) {
  const std::int64_t head = q.h / (s.H / s.Hkv), from_start = position - (q.position - q.t);
  return from_start >= 0 ? here + ((q.b * s.L + from_start) * s.Hkv + head) * d
                         : cache + ((q.b * s.C + position % s.C) * s.Hkv + head) * d;
}

__device__ float block_max(float x) {
  __shared__ float warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; ++i) x = fmaxf(x, warps[i]);
  __syncthreads();
  return x;
}

// blockIdx: query, split, group of kThreads * V columns. parts [rows, splits, dv + 2]: the weighted sum of
// values, the largest score and the sum of exponentials; without splits o [rows, dv] itself.
template <class T, int V>
__global__ void attend(CachedSizes s, CachedInputs<T> in, T* o, float* parts) {
  extern __shared__ float query[];  // [dk]
  __shared__ float weight[kThreads];
  __shared__ const T* value[kThreads];
  const std::int64_t row = blockIdx.x, splits = gridDim.y, split = blockIdx.y;
  const Query q(s, in.start, row);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (std::int64_t i = threadIdx.x; i < s.dk; i += kThreads)
    query[i] = to_float(in.q[row * s.dk + i]) * s.scale;
  __syncthreads();
  const std::int64_t share = (q.keys + splits - 1) / splits;
  const std::int64_t begin = min(split * share, q.keys), end = min(begin + share, q.keys);
  const std::int64_t column = (std::int64_t{blockIdx.z} * kThreads + threadIdx.x) * V;
  float sum[V] = {}, largest = -INFINITY, total = 0;
  for (std::int64_t tile = begin; tile < end; tile += kThreads) {
    const int count = static_cast<int>(min(end - tile, std::int64_t{kThreads}));
    for (int i = warp; i < count; i += kThreads / 32) {
      const std::int64_t position = q.first + tile + i;
      const T* const key = row_of(s, q, position, s.dk, in.k, in.cache_k);
      float score = 0;
      for (std::int64_t j = lane; j < s.dk; j += 32) score += query[j] * to_float(key[j]);
      score = warp_sum(score);
      if (lane == 0) weight[i] = score, value[i] = row_of(s, q, position, s.dv, in.v, in.cache_v);
    }
    __syncthreads();
    const bool mine = static_cast<int>(threadIdx.x) < count;
    const float score = mine ? weight[threadIdx.x] : -INFINITY, now = fmaxf(largest, block_max(score));
    float sums[1] = {mine ? __expf(score - now) : 0};
    if (mine) weight[threadIdx.x] = sums[0];
    block_sum(sums);
    const float kept = __expf(largest - now);
    largest = now, total = total * kept + sums[0];
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] *= kept;
    if (column < s.dv) {
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        float v[V];
        load(value[i] + column, v);
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += weight[i] * v[j];
      }
    }
    __syncthreads();
  }
  if (column >= s.dv) return;
  if (splits == 1) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] /= total;
    store(sum, o + row * s.dv + column);
    return;
  }
  float* const part = parts + (row * splits + split) * (s.dv + 2);
  for (int j = 0; j < V; ++j) part[column + j] = sum[j];
  if (column == 0) part[s.dv] = largest, part[s.dv + 1] = total;
}

template <class T>
__global__ void join(std::int64_t dv, std::int64_t splits, const float* parts, T* o) {
  const std::int64_t row = blockIdx.x, step = dv + 2;
  parts += row * splits * step;
  float largest = -INFINITY, total = 0;
  for (std::int64_t i = 0; i < splits; ++i) largest = fmaxf(largest, parts[i * step + dv]);
  for (std::int64_t i = 0; i < splits; ++i)
    total += __expf(parts[i * step + dv] - largest) * parts[i * step + dv + 1];
  for (std::int64_t column = threadIdx.x; column < dv; column += kThreads) {
    float sum = 0;
    for (std::int64_t i = 0; i < splits; ++i)
      sum += __expf(parts[i * step + dv] - largest) * parts[i * step + column];
    o[row * dv + column] = from_float<T>(sum / total);
  }
}

}  // namespace

template <class T>
void cached_attention(const CachedSizes& s, const CachedInputs<T>& in, std::int64_t splits, float* parts,
                      T* o, cudaStream_t stream) {
  const std::int64_t rows = s.B * s.L * s.H;
  const auto run = [&]<int V>(Width<V>) {
    const dim3 grid(grid_size(rows), static_cast<unsigned>(splits), grid_size(ceil_div(s.dv, kThreads * V)));
    attend<T, V><<<grid, kThreads, static_cast<std::size_t>(s.dk) * sizeof(float), stream>>>(s, in, o, parts);
  };
  if (s.dv > kThreads) {
    with_pack_width<T>(s.dv, run, in.v, in.cache_v, o);
  } else {
    run(Width<1>{});
  }
  if (splits > 1) join<<<grid_size(rows), kThreads, 0, stream>>>(s.dv, splits, parts, o);
}

template void cached_attention(const CachedSizes&, const CachedInputs<float>&, std::int64_t, float*, float*,
                               cudaStream_t);
template void cached_attention(const CachedSizes&, const CachedInputs<Bfloat16>&, std::int64_t, float*,
                               Bfloat16*, cudaStream_t);

}  // namespace megalodon::ops::cuda
