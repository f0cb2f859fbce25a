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

// The keys or values [C, d] of a head of a stream in a ring [B, C, H, d].
template <class T>
struct Ring {
  T* ring;
  std::uint64_t first;
  unsigned slots, pitch;

  __device__ Ring(T* ring_, std::int64_t C, std::int64_t H, std::int64_t d, int b, int h)
      : ring(ring_),
        first(static_cast<std::uint64_t>((b * C * H + h) * d)),
        slots(static_cast<unsigned>(C)),
        pitch(static_cast<unsigned>(H * d)) {
    asm("" : "+l"(first));  // once: not added up anew for each slot
  }
  __device__ T* at(int slot) const {
    const auto i = static_cast<unsigned>(slot);
    return ring + (first + std::uint64_t{i < slots ? i : i - slots} * pitch);
  }
};

// Blocks along x: a head of a stream; y: columns; z: the cluster.
template <class T, int V>
struct Block {
  const AttentionStep<T>& a;
  const int column_threads;  // that share a value's columns, V each; a power of two
  const int b, h, dz, dv;
  const Ring<T> ring_k, ring_v;
  int keys, first_slot, begin, end, column;

  __device__ Block(const AttentionStep<T>& call, int threads_of_columns)
      : a(call),
        column_threads(threads_of_columns),
        b(static_cast<int>(blockIdx.x / static_cast<unsigned>(a.H))),
        h(static_cast<int>(blockIdx.x % static_cast<unsigned>(a.H))),
        dz(static_cast<int>(a.dz)),
        dv(static_cast<int>(a.dv)),
        ring_k(a.ring_k, a.C, a.H, a.dz, b, h),
        ring_v(a.ring_v, a.C, a.H, a.dv, b, h) {
    const std::int64_t position = a.start[b], in_chunk = position % a.chunk;
    keys = static_cast<int>(in_chunk) + 1, first_slot = static_cast<int>((position - in_chunk) % a.C);
    const int blocks = static_cast<int>(cluster_size()), share = (keys + blocks - 1) / blocks;
    begin = min(static_cast<int>(blockIdx.z) * share, keys), end = min(begin + share, keys);
    column = static_cast<int>(blockIdx.y * column_threads + threadIdx.x % column_threads) * V;
  }
  __device__ bool has_newest() const { return begin < end && end == keys; }
  // Of the head, in tensors [B, H, d].
  __device__ std::int64_t head(int d) const { return (b * a.H + h) * d; }
  __device__ T* key(int i) const { return ring_k.at(first_slot + i); }
  __device__ T* value(int i) const { return ring_v.at(first_slot + i); }
};

// Query and new key of the block's head; what they are made of is on its way from the beginning.
template <class T, int V>
class QueryKey {
 public:
  __device__ explicit QueryKey(const Block<T, V>& block)
      : block_(block), z_(block.a.z + block.head(block.dz)), own_(2 * static_cast<int>(threadIdx.x)) {
    if (own_ < block.dz) read(own_);
    const int pack = first_pack();
    if (pack < block.dz) first_ = load_pack<V>(z_ + pack);
  }
  // Into query [dz], where before the turns of its pairs are, and key [dz].
  __device__ void make(float* query, T* key) {
    float values[V], squares = 0;
    for (int i = first_pack(); i < block_.dz; i += 32 * V) {
      cuda::unpack(i == first_pack() ? first_ : load_pack<V>(z_ + i), values);
#pragma unroll
      for (int j = 0; j < V; ++j) squares += values[j] * values[j];
    }
    const float features = static_cast<float>(block_.dz);
    const float r = rsqrtf(warp_sum(squares) / features + block_.a.eps), scale = rsqrtf(features);
    for (int at = own_; at < block_.dz; at += 2 * kThreads) {
      if (at != own_) read(at);
      const float2 turn = reinterpret_cast<float2*>(query)[at / 2];
      const auto turned = [&](int i) {
        return rotate({pair_[0] * r * ((1 + gamma_[i][0]) * scale) + beta_[i][0],
                       pair_[1] * r * ((1 + gamma_[i][1]) * scale) + beta_[i][1]},
                      turn);
      };
      const float2 q = turned(0), k = turned(1);
      query[at] = q.x, query[at + 1] = q.y;
      key[at] = from_float<T>(k.x), key[at + 1] = from_float<T>(k.y);
    }
    __syncthreads();
  }

 private:
  __device__ static int first_pack() { return static_cast<int>(threadIdx.x) % 32 * V; }
  __device__ void read(int at) {
    const auto& a = block_.a;
    load(z_ + at, pair_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load(a.gamma + (i * a.H + block_.h) * a.dz + at, gamma_[i]);
      load(a.beta + (i * a.H + block_.h) * a.dz + at, beta_[i]);
    }
  }

  const Block<T, V>& block_;
  const T* const z_;
  const int own_;                             // of the thread's pairs the first
  float pair_[2], gamma_[2][2], beta_[2][2];  // these for query and key
  Pack<T, V> first_;                          // of its packs
};

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
  int lanes, lane, index, count;  // lanes: a power of two

  __device__ explicit Team(int features) : lanes(1) {
    int shift = 0;
#pragma unroll 1
    while (lanes * V < features && lanes < 32) lanes *= 2, ++shift;
    lane = static_cast<int>(threadIdx.x) % 32 & (lanes - 1), index = static_cast<int>(threadIdx.x) >> shift;
    count = kThreads >> shift;
  }
  // V features of the team's keys from `begin` on; of the newest what its slot held before.
  __device__ void read(const Block<T, V>& block, int tile, int keys, int begin, int feature,
                       uint4 (&k)[kAtOnce]) const {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      k[u] = read_pack(block.key(tile + min(begin + u * count + index, keys - 1)) + feature);
  }
};

// Scores of the keys tile .. tile + keys - 1. `k`: if `is_read`, the first that the team reads.
template <class T, int V>
__device__ void score_keys(const Block<T, V>& block, const Team<T, V>& team, const float* query,
                           const T* newest, int tile, int keys, bool is_read, uint4 (&k)[kAtOnce],
                           float* scores) {
  const int features = block.dz;
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

// What does not depend on the kernels before: the turns of the pairs, and the parameters, keys and values
// come into the cache.
template <class T, int V>
__device__ void prepare(const Block<T, V>& block, bool prefetches, float2* turns) {
  constexpr int kLine = 128 / sizeof(T);
  const auto& a = block.a;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread * 32; i < block.dz; i += kThreads * 32) {
    for (std::int64_t head = block.h; head < 2 * a.H; head += a.H)
      prefetch(a.gamma + head * a.dz + i), prefetch(a.beta + head * a.dz + i);
  }
  const int width = block.column_threads * V, first = static_cast<int>(blockIdx.y) * width,
            end = min(first + width, block.dv);
  for (int i = block.begin + thread; prefetches && i < min(block.end, block.keys - 1); i += kThreads) {
    for (int j = 0; j < block.dz && blockIdx.y == 0; j += kLine) prefetch(block.key(i) + j);
    for (int j = first; j < end; j += kLine) prefetch(block.value(i) + j);
  }
  for (int pair = thread; 2 * pair < block.dz; pair += kThreads)
    turns[pair] = rotation(block.keys - 1, rope_frequency(a.log2_base, pair, block.dz));
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    attend(AttentionStep<T> a, int column_threads, bool prefetches) {
  extern __shared__ __align__(16) float query[];  // [dz], then the new key
  __shared__ float weight[kTile], of_thread[kThreads * V], part[kThreads * V];
  __shared__ float of_block[2];  // largest score, sum of exponentials
  T* const newest = reinterpret_cast<T*>(query + a.dz);
  let_next_start();
  const Block<T, V> block(a, column_threads);
  prepare(block, prefetches, reinterpret_cast<float2*>(query));
  const Team<T, V> team(block.dz);
  const int row = static_cast<int>(threadIdx.x) / column_threads, rows = kThreads / column_threads;
  const int width = column_threads * V;
  const bool has_column = block.column < block.dv;
  const T* const value = a.v + block.head(block.dv);
  const auto tile_keys = [&](int tile) { return min(block.end - tile, kTile); };
  uint4 k[kAtOnce], v[kAtOnce];
  const auto read_values = [&](int tile, int begin) {
    const int count = tile_keys(tile);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = tile + min(begin + u * rows, count - 1);
      v[u] = read_pack((i == block.keys - 1 ? value : block.value(i)) + block.column);
    }
  };
  // The first keys and values are on their way while the query is made, later ones while those before are
  // used.
  const bool is_read = block.begin < block.end && team.lane * V < block.dz;
  wait_for_previous();

  QueryKey<T, V> query_key(block);
  if (is_read) team.read(block, block.begin, tile_keys(block.begin), 0, team.lane * V, k);
  if (has_column && block.begin + row < block.end && row < kTile) read_values(block.begin, row);
  // The block's share of the columns, and the gates of the thread's first.
  const int share = (width + static_cast<int>(cluster_size()) - 1) / static_cast<int>(cluster_size());
  const int first_own = static_cast<int>(blockIdx.z) * share, end_own = min(width, first_own + share);
  const auto place = [&](int i) {
    const int column = static_cast<int>(blockIdx.y) * width + i;
    return column < block.dv ? block.head(block.dv) + column : -1;
  };
  const int own = first_own + static_cast<int>(threadIdx.x);
  const float own_gate = own < end_own && place(own) >= 0 ? to_float(a.gate[place(own)]) : 0;
  query_key.make(query, newest);

  float sum[V] = {};
  BlockSoftmax softmax;
  for (int tile = block.begin; tile < block.end; tile += kTile) {
    const int count = tile_keys(tile);
    score_keys(block, team, query, newest, tile, count, is_read && tile == block.begin, k, weight);
    if (tile != block.begin && has_column && row < count) read_values(tile, row);
    const float kept = softmax.add<kWarps>(weight, count);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] *= kept;
    const int step = rows * kAtOnce;
    for (int begin = row; has_column && begin < count; begin += step) {
      uint4 now[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) now[u] = v[u];
      if (begin + step < count) read_values(tile, begin + step);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const float w = begin + u * rows < count ? weight[begin + u * rows] : 0;
        float columns[V];
        unpack<T>(now[u], columns);
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
      T* const key = block.key(block.keys - 1);
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < block.dz; i += kThreads) key[i] = newest[i];
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
  for (int i = own; i < end_own; i += kThreads) {
    const std::int64_t at = place(i);
    if (at < 0) break;
    float o = 0;
#pragma unroll
    for (unsigned j = 0; j < kSplits; ++j) {
      if (j < blocks) o += scale[j] * read_of_block(&part[i], j);
    }
    a.o[at] = from_float<T>(o / all * (i == own ? own_gate : to_float(a.gate[at])));
  }
  wait_for_readers();
}

}  // namespace

template <class T>
void attention_step(const AttentionStep<T>& a, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  constexpr std::int64_t kWanted = 256;  // blocks: two a multiprocessor
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
