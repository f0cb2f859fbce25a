#include <algorithm>
#include <cfloat>

#include "ops/attention/cuda.h"
#include "ops/cuda_device.h"
#include "ops/cuda_softmax.h"

// Attention over a cache, a query at a time: a block, or of narrow heads a warp, goes through some of the
// keys that its query sees, with the softmax relative to the largest score so far. Where there are few
// queries the keys of each are shared among `splits` of them, and a second kernel joins their parts.
namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;

struct Query {
  std::int64_t b, t, h, position, first, keys;  // keys: those from position `first` on that it sees

  __device__ Query(const CachedSizes& s, const std::int64_t* start, unsigned row) {
    const auto L = static_cast<unsigned>(s.L), H = static_cast<unsigned>(s.H);
    h = row % H, t = row / H % L, b = row / H / L;
    position = start[b] + t;
    const std::int64_t chunk = s.chunk > 0 ? position / s.chunk - s.previous_chunks : 0;
    first = chunk > 0 ? chunk * s.chunk : 0;
    keys = position - first + 1;
  }
};

// Row of key or value `position` of a query's head: in this call's arrays [B, L, Hkv, d], a position at each
// `step`, or in the cache [B, C, Hkv, d].
template <class T>
__device__ const T* row_of(const CachedSizes& s, const Query& q, std::int64_t position, std::int64_t d,
                           const T* here, std::int64_t step, const T* cache) {
  const std::int64_t head = q.h / (s.H / s.Hkv), from_start = position - (q.position - q.t);
  return from_start >= 0 ? here + (q.b * s.L + from_start) * step + head * d
                         : cache + ((q.b * s.C + position % s.C) * s.Hkv + head) * d;
}

// blockIdx: query, split, group of kThreads * V columns. parts [rows, splits, dv + 2]: the weighted sum of
// values, the largest score and the sum of exponentials; without splits o [rows, dv] itself.
template <class T, int V>
__global__ void attend(CachedSizes s, CachedInputs<T> in, T* o, float* parts) {
  extern __shared__ float query[];  // [dk]
  __shared__ float weight[kThreads];
  __shared__ const T* value[kThreads];
  const std::int64_t row = blockIdx.x, splits = gridDim.y, split = blockIdx.y;
  const Query q(s, in.start, blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (std::int64_t i = threadIdx.x; i < s.dk; i += kThreads)
    query[i] = to_float(in.q[(q.b * s.L + q.t) * s.q_row + q.h * s.dk + i]) * s.scale;
  __syncthreads();
  const std::int64_t share = (q.keys + splits - 1) / splits;
  const std::int64_t begin = min(split * share, q.keys), end = min(begin + share, q.keys);
  const std::int64_t column = (std::int64_t{blockIdx.z} * kThreads + threadIdx.x) * V;
  float sum[V] = {};
  BlockSoftmax softmax;
  for (std::int64_t tile = begin; tile < end; tile += kThreads) {
    const int count = static_cast<int>(min(end - tile, std::int64_t{kThreads}));
    for (int i = warp; i < count; i += kThreads / 32) {
      const std::int64_t position = q.first + tile + i;
      const T* const key = row_of(s, q, position, s.dk, in.k, s.k_row, in.cache_k);
      float score = 0;
      for (std::int64_t j = lane; j < s.dk; j += 32) score += query[j] * to_float(key[j]);
      score = warp_sum(score);
      if (lane == 0) weight[i] = score, value[i] = row_of(s, q, position, s.dv, in.v, s.v_row, in.cache_v);
    }
    __syncthreads();
    const float kept = softmax.add<kThreads / 32>(weight, count);
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
    for (int j = 0; j < V; ++j) sum[j] /= softmax.total;
    store(sum, o + row * s.dv + column);
    return;
  }
  float* const part = parts + (row * splits + split) * (s.dv + 2);
  for (int j = 0; j < V; ++j) part[column + j] = sum[j];
  if (column == 0) part[s.dv] = softmax.largest, part[s.dv + 1] = softmax.total;
}

constexpr int kNarrowWarps = 4;  // of a block
constexpr int kAtOnce = 4;       // keys and values that a lane reads before it needs the first

// A lane's packs of the rows of a head in this call's array [B, L, Hkv, d] and in the cache [B, C, Hkv, d].
template <class T>
struct Rows {
  const T* here;
  T* cache;
  unsigned step_here, step;
  bool any;

  __device__ Rows(const CachedSizes& s, const Query& q, std::int64_t d, const T* here_,
                  std::int64_t step_here_, T* cache_, int first)
      : step_here(static_cast<unsigned>(step_here_)), step(static_cast<unsigned>(s.Hkv * d)), any(first < d) {
    const std::int64_t from = q.h / static_cast<unsigned>(s.H / s.Hkv) * d + first;
    here = here_ + q.b * s.L * step_here_ + from;
    cache = cache_ + q.b * s.C * step + from;
  }
  __device__ uint4 read(bool is_here, unsigned row, bool wanted) const {
    const T* const from = (is_here ? here : cache) + std::uint64_t{row} * (is_here ? step_here : step);
    return wanted && any ? *reinterpret_cast<const uint4*>(from) : uint4{};
  }
  __device__ void write(unsigned slot, const uint4& pack) const {
    if (any) *reinterpret_cast<uint4*>(cache + std::uint64_t{slot} * step) = pack;
  }
};

// A warp a query and split. kLanes lanes read a key in packs of 16 bytes, so that the warp has 32 / kLanes
// groups, each with some of the keys and a softmax of its own; they are joined at the end.
template <class T, int kLanes>
__global__ void __launch_bounds__(32 * kNarrowWarps, 6)
    attend_narrow(CachedSizes s, CachedInputs<T> in, T* o, float* parts) {
  constexpr int V = 16 / sizeof(T), kGroups = 32 / kLanes;
  const unsigned row = blockIdx.x * kNarrowWarps + __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (row >= s.B * s.L * s.H) return;
  const Query q(s, in.start, row);
  const int group = static_cast<int>(threadIdx.x) % 32 / kLanes,
            column = static_cast<int>(threadIdx.x) % kLanes * V;
  const Rows<T> key_rows(s, q, s.dk, in.k, s.k_row, in.cache_k, column),
      value_rows(s, q, s.dv, in.v, s.v_row, in.cache_v, column);

  if (s.stores && blockIdx.y == 0 && group == 0 && q.h % (s.H / s.Hkv) == 0) {
    const auto slot = static_cast<unsigned>(q.position % s.C);
    key_rows.write(slot, key_rows.read(true, 0, true));
    value_rows.write(slot, value_rows.read(true, 0, true));
  }

  // Key i of those that the query sees is in the cache where i < cached, at slot first_slot + i there, else
  // in row i - before of this call.
  const std::int64_t from_start = q.first - (q.position - q.t);
  const unsigned keys = static_cast<unsigned>(q.keys), slots = static_cast<unsigned>(s.C),
                 cached = from_start < 0 ? static_cast<unsigned>(-from_start) : 0,
                 before = static_cast<unsigned>(-from_start),
                 first_slot = static_cast<unsigned>(q.first < s.C ? q.first : q.first % s.C);
  const unsigned splits = gridDim.y, split = blockIdx.y, share = (keys + splits - 1) / splits;
  const unsigned begin = min(split * share, keys), end = min(begin + share, keys);

  float query[V], sum[V] = {}, largest = -FLT_MAX, total = 0;
  const T* const of_query = in.q + (q.b * s.L + q.t) * s.q_row + q.h * s.dk + column;
  unpack<T>(column < s.dk ? *reinterpret_cast<const uint4*>(of_query) : uint4{}, query);
#pragma unroll
  for (int j = 0; j < V; ++j) query[j] *= s.scale;
  for (unsigned tile = begin; tile < end; tile += kGroups * kAtOnce) {
    uint4 key[kAtOnce], value[kAtOnce];
    float score[kAtOnce], now = largest, x[V];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const unsigned i = tile + u * kGroups + group, slot = first_slot + i;
      const bool here = i >= cached;
      const unsigned place = here ? i - before : slot < slots ? slot : slot - slots;
      key[u] = key_rows.read(here, place, i < end);
      value[u] = value_rows.read(here, place, i < end);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      unpack<T>(key[u], x);
      score[u] = 0;
#pragma unroll
      for (int j = 0; j < V; ++j) score[u] += query[j] * x[j];
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        score[u] += __shfl_xor_sync(~0u, score[u], offset);
      if (tile + u * kGroups + group >= end) score[u] = -INFINITY;
      now = fmaxf(now, score[u]);
    }
    const float kept = __expf(largest - now);
    largest = now, total *= kept;
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] *= kept;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const float weight = __expf(score[u] - now);
      total += weight;
      unpack<T>(value[u], x);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += weight * x[j];
    }
  }
#pragma unroll
  for (int offset = kLanes; offset < 32; offset *= 2) {
    const float other = __shfl_xor_sync(~0u, largest, offset), now = fmaxf(largest, other);
    const float kept = __expf(largest - now), others = __expf(other - now);
    largest = now, total = total * kept + __shfl_xor_sync(~0u, total, offset) * others;
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = sum[j] * kept + __shfl_xor_sync(~0u, sum[j], offset) * others;
  }
  if (group > 0 || column >= s.dv) return;
  if (splits == 1) {
    const float factor = 1 / total;
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] *= factor;
    store(sum, o + row * s.dv + column);
    return;
  }
  float* const part = parts + (std::int64_t{row} * splits + split) * (s.dv + 2);
#pragma unroll
  for (int j = 0; j < V; ++j) part[column + j] = sum[j];
  if (column == 0) part[s.dv] = largest, part[s.dv + 1] = total;
}

// Lanes for the packs of a narrow head; 0 where a head is none.
template <class T>
int lanes_of(const CachedSizes& s) {
  constexpr std::int64_t V = 16 / sizeof(T);
  const std::int64_t widest = std::max(s.dk, s.dv);
  if (s.dk % V != 0 || s.dv % V != 0 || widest > 32 * V) return 0;
  int lanes = 4;
  while (lanes * V < widest) lanes *= 2;
  return lanes;
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
bool cached_attention_stores(const CachedSizes& s) {
  return s.L == 1 && lanes_of<T>(s) > 0;
}

template <class T>
std::int64_t cached_splits(const CachedSizes& s) {
  const std::int64_t rows = s.B * s.L * s.H;
  if (lanes_of<T>(s) == 0) return std::clamp<std::int64_t>(264 / rows, 1, 32);
  const std::int64_t seen = std::min(s.chunk > 0 ? s.chunk * (1 + s.previous_chunks) : s.C, s.C) + s.L;
  return std::clamp<std::int64_t>(2112 / rows, 1, std::min<std::int64_t>(ceil_div(seen, 64), 128));
}

template <class T>
void cached_attention(const CachedSizes& s, const CachedInputs<T>& in, std::int64_t splits, float* parts,
                      T* o, cudaStream_t stream) {
  const std::int64_t rows = s.B * s.L * s.H;
  const auto run = [&]<int V>(Width<V>) {
    const dim3 grid(grid_size(rows), static_cast<unsigned>(splits), grid_size(ceil_div(s.dv, kThreads * V)));
    attend<T, V><<<grid, kThreads, static_cast<std::size_t>(s.dk) * sizeof(float), stream>>>(s, in, o, parts);
  };
  const auto run_narrow = [&]<int kLanes>(Width<kLanes>) {
    const dim3 grid(grid_size(ceil_div(rows, kNarrowWarps)), static_cast<unsigned>(splits));
    attend_narrow<T, kLanes><<<grid, 32 * kNarrowWarps, 0, stream>>>(s, in, o, parts);
  };
  switch (lanes_of<T>(s)) {
    case 4:
      run_narrow(Width<4>{});
      break;
    case 8:
      run_narrow(Width<8>{});
      break;
    case 16:
      run_narrow(Width<16>{});
      break;
    case 32:
      run_narrow(Width<32>{});
      break;
    default:
      s.dv > kThreads ? with_pack_width<T>(s.dv, run, in.v, in.cache_v, o) : run(Width<1>{});
  }
  if (splits > 1) join<<<grid_size(rows), kThreads, 0, stream>>>(s.dv, splits, parts, o);
}

template bool cached_attention_stores<float>(const CachedSizes&);
template bool cached_attention_stores<Bfloat16>(const CachedSizes&);
template std::int64_t cached_splits<float>(const CachedSizes&);
template std::int64_t cached_splits<Bfloat16>(const CachedSizes&);
template void cached_attention(const CachedSizes&, const CachedInputs<float>&, std::int64_t, float*, float*,
                               cudaStream_t);
template void cached_attention(const CachedSizes&, const CachedInputs<Bfloat16>&, std::int64_t, float*,
                               Bfloat16*, cudaStream_t);

}  // namespace megalodon::ops::cuda
