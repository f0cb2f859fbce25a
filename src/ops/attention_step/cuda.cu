#include "ops/attention_step/cuda.h"

#include <cmath>

#include "ops/cuda_device.h"
#include "ops/cuda_softmax.h"
#include "ops/cuda_step.h"
#include "ops/rope/cuda_rotation.h"

// The keys that a query sees are shared among the blocks of a cluster, which join their sums through each
// other's shared memory; further blocks take other columns of the values, with scores of their own. Every
// block makes query and new key for itself.
namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 256;  // keys whose weights are in memory at once
constexpr int kAtOnce = 8;  // keys that a thread reads before it needs the first
constexpr unsigned kSplits = 8;
// Bytes; more would drive each other out of the cache.
constexpr std::int64_t kMostPrefetched = 32 << 20;

// Blocks along x: a head of a stream; y: columns; z: the cluster.
template <class T, int V>
struct Block {
  const AttentionStep<T>& a;
  int column_threads;  // that share a value's columns, V each; a power of two
  std::int64_t b, h, keys, first_slot, begin, end, column;

  __device__ Block(const AttentionStep<T>& call, int threads_of_columns)
      : a(call), column_threads(threads_of_columns), b(blockIdx.x / a.H), h(blockIdx.x % a.H) {
    const std::int64_t position = a.start[b], in_chunk = position % a.chunk;
    keys = in_chunk + 1, first_slot = (position - in_chunk) % a.C;
    const std::int64_t share = (keys + cluster_size() - 1) / cluster_size();
    begin = min(blockIdx.z * share, keys), end = min(begin + share, keys);
    column = (std::int64_t{blockIdx.y} * column_threads + threadIdx.x % column_threads) * V;
  }
  __device__ bool has_newest() const { return begin < end && end == keys; }
  __device__ std::int64_t row(std::int64_t key) const {
    const std::int64_t slot = first_slot + key;
    return (b * a.C + (slot < a.C ? slot : slot - a.C)) * a.H + h;
  }
  __device__ T* key(std::int64_t i) const { return a.ring_k + row(i) * a.dz; }
  __device__ T* value(std::int64_t i) const { return a.ring_v + row(i) * a.dv; }
};

// Query [dz], where before the frequencies of its pairs are, and new key [dz] of the block's head.
template <class T, int V>
__device__ void query_key(const Block<T, V>& block, float* query, T* key) {
  const auto& a = block.a;
  const std::int64_t head = block.h * a.dz;
  const T* const z = a.z + block.b * a.H * a.dz + head;
  float squares[1] = {0};
  for (std::int64_t i = threadIdx.x; i < a.dz; i += kThreads) squares[0] += to_float(z[i]) * to_float(z[i]);
  block_sum(squares);
  const float r = 1 / sqrtf(squares[0] / static_cast<float>(a.dz) + a.eps);
  const float scale = 1 / sqrtf(static_cast<float>(a.dz));
  for (std::int64_t pair = threadIdx.x; 2 * pair < a.dz; pair += kThreads) {
    const std::int64_t at = 2 * pair;
    const float2 turn = rotation(block.keys - 1, reinterpret_cast<double*>(query)[pair]);
    const auto turned = [&](const float* gamma, const float* beta) {
      return rotate({to_float(z[at]) * r * ((1 + gamma[at]) * scale) + beta[at],
                     to_float(z[at + 1]) * r * ((1 + gamma[at + 1]) * scale) + beta[at + 1]},
                    turn);
    };
    const float2 q = turned(a.gamma + head, a.beta + head);
    const float2 k = turned(a.gamma + (a.H + block.h) * a.dz, a.beta + (a.H + block.h) * a.dz);
    query[at] = q.x, query[at + 1] = q.y;
    key[at] = from_float<T>(k.x), key[at + 1] = from_float<T>(k.y);
  }
  __syncthreads();
}

// 16 bytes, as they are until they are needed.
__device__ uint4 read_pack(const void* from) {
  return *static_cast<const uint4*>(from);
}
template <class T, int V>
__device__ void unpack(const uint4& pack, float (&to)[V]) {
  const unsigned word[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (V == 4) {
      to[i] = __uint_as_float(word[i]);
    } else {
      to[2 * i] = __uint_as_float(word[i] << 16), to[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  }
}

// A block's threads in teams that each take kAtOnce keys of a tile at a time, a thread V features in turn.
template <class T, int V>
struct Team {
  int lanes, lane, index, count;

  __device__ explicit Team(std::int64_t features) : lanes(1) {
    while (lanes * V < features && lanes < 32) lanes *= 2;
    lane = static_cast<int>(threadIdx.x) % lanes, index = static_cast<int>(threadIdx.x) / lanes;
    count = kThreads / lanes;
  }
  // V features of the team's keys from `begin` on; of the newest what its slot held before.
  __device__ void read(const Block<T, V>& block, std::int64_t tile, int keys, int begin, int feature,
                       uint4 (&k)[kAtOnce]) const {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      k[u] = read_pack(block.key(tile + min(begin + u * count + index, keys - 1)) + feature);
  }
};

// Scores of the keys tile .. tile + keys - 1. `k`: if `is_read`, the first that the team reads.
template <class T, int V>
__device__ void score_keys(const Block<T, V>& block, const Team<T, V>& team, const float* query,
                           const T* newest, std::int64_t tile, int keys, bool is_read, uint4 (&k)[kAtOnce],
                           float* scores) {
  const int features = static_cast<int>(block.a.dz);
  for (int begin = 0; begin < keys; begin += team.count * kAtOnce) {
    float score[kAtOnce] = {};
    for (int feature = team.lane * V; feature < features; feature += team.lanes * V) {
      if (!is_read) team.read(block, tile, keys, begin, feature, k);
      is_read = false;
      float q[V];
#pragma unroll
      for (int j = 0; j < V; j += 4) {
        const uint4 four = read_pack(query + feature + j);
        q[j] = __uint_as_float(four.x), q[j + 1] = __uint_as_float(four.y);
        q[j + 2] = __uint_as_float(four.z), q[j + 3] = __uint_as_float(four.w);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (tile + begin + u * team.count + team.index == block.keys - 1) k[u] = read_pack(newest + feature);
        float features_of_key[V];
        unpack<T>(k[u], features_of_key);
#pragma unroll
        for (int j = 0; j < V; ++j) score[u] += q[j] * features_of_key[j];
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      for (int offset = team.lanes / 2; offset > 0; offset /= 2)
        score[u] += __shfl_xor_sync(~0u, score[u], offset);
      const int i = begin + u * team.count + team.index;
      if (team.lane == 0 && i < keys) scores[i] = score[u];
    }
  }
  __syncthreads();
}

// What does not depend on the kernel before: the frequencies of the pairs, and the parameters, keys and
// values come into the cache. Should `start` not be written yet, others of the ring come for nothing.
template <class T, int V>
__device__ void prepare(const AttentionStep<T>& a, int column_threads, bool prefetches, double* frequency) {
  constexpr int kLine = 128 / sizeof(T);
  const Block<T, V> block(a, column_threads);
  for (std::int64_t pair = threadIdx.x; 2 * pair < a.dz; pair += kThreads)
    frequency[pair] = rope_frequency(a.log2_base, pair, a.dz);
  for (std::int64_t i = threadIdx.x * 32; i < a.dz; i += kThreads * 32) {
    for (std::int64_t head = block.h; head < 2 * a.H; head += a.H)
      prefetch(a.gamma + head * a.dz + i), prefetch(a.beta + head * a.dz + i);
  }
  const std::int64_t width = column_threads * V, first = blockIdx.y * width, end = min(first + width, a.dv);
  for (std::int64_t i = block.begin + threadIdx.x; prefetches && i < min(block.end, block.keys - 1);
       i += kThreads) {
    for (std::int64_t j = 0; j < a.dz && blockIdx.y == 0; j += kLine) prefetch(block.key(i) + j);
    for (std::int64_t j = first; j < end; j += kLine) prefetch(block.value(i) + j);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    attend(AttentionStep<T> a, int column_threads, bool prefetches) {
  extern __shared__ __align__(16) float query[];  // [dz], then the new key
  __shared__ float weight[kTile], of_thread[kThreads * V], part[kThreads * V];
  __shared__ float of_block[2];  // largest score, sum of exponentials
  T* const newest = reinterpret_cast<T*>(query + a.dz);
  prepare<T, V>(a, column_threads, prefetches, reinterpret_cast<double*>(query));
  wait_for_previous();

  const Block<T, V> block(a, column_threads);
  const int row = static_cast<int>(threadIdx.x) / column_threads, rows = kThreads / column_threads;
  const int width = column_threads * V;
  const bool has_column = block.column < a.dv;
  const T* const value = a.v + (block.b * a.H + block.h) * a.dv;
  const auto tile_keys = [&](std::int64_t tile) {
    return static_cast<int>(min(block.end - tile, std::int64_t{kTile}));
  };
  // Keys are on their way while the query is made, values while the softmax is.
  const Team<T, V> team(a.dz);
  uint4 k[kAtOnce], v[kAtOnce];
  const bool is_read = block.begin < block.end && team.lane * V < a.dz;
  if (is_read) team.read(block, block.begin, tile_keys(block.begin), 0, team.lane * V, k);
  query_key(block, query, newest);

  float sum[V] = {};
  BlockSoftmax softmax;
  for (std::int64_t tile = block.begin; tile < block.end; tile += kTile) {
    const int count = tile_keys(tile);
    score_keys(block, team, query, newest, tile, count, is_read && tile == block.begin, k, weight);
    const auto read_values = [&](int begin) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const std::int64_t i = tile + min(begin + u * rows, count - 1);
        v[u] = read_pack((i == block.keys - 1 ? value : block.value(i)) + block.column);
      }
    };
    if (has_column && row < count) read_values(row);
    const float kept = softmax.add<kWarps>(weight, count);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] *= kept;
    for (int begin = row; has_column && begin < count; begin += rows * kAtOnce) {
      if (begin != row) read_values(begin);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const float w = begin + u * rows < count ? weight[begin + u * rows] : 0;
        float columns[V];
        unpack<T>(v[u], columns);
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += w * columns[j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < V; ++j) of_thread[threadIdx.x * V + j] = sum[j];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < width; i += kThreads) {
    float all = 0;
    for (int r = 0; r < rows; ++r) all += of_thread[r * width + i];
    part[i] = all;
  }
  if (threadIdx.x == 0) of_block[0] = softmax.largest, of_block[1] = softmax.total;
  if (block.has_newest()) {
    if (blockIdx.y == 0) {
      for (std::int64_t i = threadIdx.x; i < a.dz; i += kThreads) block.key(block.keys - 1)[i] = newest[i];
    }
    if (row == 0 && has_column) {
      *reinterpret_cast<uint4*>(block.value(block.keys - 1) + block.column) = read_pack(value + block.column);
    }
  }
  cluster_sync();

  const unsigned blocks = cluster_size();
  float scale[kSplits];
  float most = -INFINITY, all = 0;
  for (unsigned i = 0; i < blocks; ++i) most = fmaxf(most, read_of_block(&of_block[0], i));
#pragma unroll
  for (unsigned i = 0; i < kSplits; ++i) {
    if (i >= blocks) break;
    scale[i] = __expf(read_of_block(&of_block[0], i) - most);
    all += scale[i] * read_of_block(&of_block[1], i);
  }
  const int share = (width + static_cast<int>(blocks) - 1) / static_cast<int>(blocks);
  const int end = min(width, static_cast<int>(blockIdx.z + 1) * share);
  for (int i = static_cast<int>(blockIdx.z) * share + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const std::int64_t column = std::int64_t{blockIdx.y} * width + i;
    if (column >= a.dv) break;
    float o = 0;
#pragma unroll
    for (unsigned j = 0; j < kSplits; ++j) {
      if (j < blocks) o += scale[j] * read_of_block(&part[i], j);
    }
    const std::int64_t at = (block.b * a.H + block.h) * a.dv + column;
    a.o[at] = from_float<T>(o / all * to_float(a.gate[at]));
  }
  cluster_sync();  // no block ends while another reads its memory
}

}  // namespace

template <class T>
void attention_step(const AttentionStep<T>& a, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  constexpr std::int64_t kWanted = 256;  // blocks, two on each multiprocessor
  if (a.B == 0) return;
  unsigned splits = is_hopper() ? kSplits : 1;
  int column_threads = 1;
  while (column_threads < kThreads && column_threads * V < a.dv) column_threads *= 2;
  const auto groups = [&] { return ceil_div(a.dv, column_threads * V); };
  while (column_threads > 32 && a.B * a.H * groups() * splits < kWanted) column_threads /= 2;
  while (splits > 1 && a.B * a.H * groups() * splits > kWanted) splits /= 2;
  const std::int64_t cache_bytes = a.B * a.chunk * a.H * (a.dz + a.dv) * std::int64_t{sizeof(T)};
  const dim3 grid(grid_size(a.B * a.H), static_cast<unsigned>(groups()), splits);
  launch_step({grid, kThreads, static_cast<std::size_t>(a.dz) * (sizeof(float) + sizeof(T)), stream, splits},
              attend<T, V>, a, column_threads, cache_bytes <= kMostPrefetched);
}

template void attention_step(const AttentionStep<float>&, cudaStream_t);
template void attention_step(const AttentionStep<Bfloat16>&, cudaStream_t);

}  // namespace megalodon::ops::cuda
