#include "ops/attention_step/cuda.h"

#include <cmath>

#include "ops/cuda_device.h"
#include "ops/cuda_step.h"
#include "ops/rope/cuda_rotation.h"

// A cluster of blocks has a head of a stream, or a group of the columns of its values. Where the query sees
// few keys each block takes all of them and its share of the columns, and waits for no other; where it sees
// many, the blocks share the keys and join their sums through each other's shared memory. Every block makes
// query and new key for itself.
// What the kernel does is little, and its instructions come from memory each time, for between two calls go
// the weights of a layer: the loops stay rolled up.
namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 256;                // most keys whose weights are in memory at once
constexpr int kKeySlots = 8, kSlots = 8;  // packs of keys and of values that are on their way to a thread
constexpr int kFewKeys = 128;
constexpr unsigned kSplits = 8;

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

// A pack on its way to shared memory, and the end of a group of them (none, one ...).
__device__ void copy_pack(uint4* to, const void* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from)
      : "memory");
}
__device__ void end_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until no more than kLeft of this thread's groups are on their way.
template <int kLeft>
__device__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ int remainder_of(std::int64_t x, std::int64_t by) {
  if (((x | by) >> 32) == 0) return static_cast<int>(static_cast<unsigned>(x) % static_cast<unsigned>(by));
  return static_cast<int>(x % by);
}

// Where the keys that a query sees lie, or some columns of their values.
struct Ring {
  char* base;
  unsigned row_bytes, first, slots;

  __device__ char* at(int key) const {
    const unsigned slot = first + static_cast<unsigned>(key);
    return base + std::uint64_t{slot < slots ? slot : slot - slots} * row_bytes;
  }
};

__device__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

// Four features before the rotation, and what makes query and key of them.
template <class T>
struct Features {
  T z[4];
  float gamma[2][4], beta[2][4];

  __device__ void read(const AttentionStep<T>& a, unsigned b, unsigned h, unsigned feature) {
    const unsigned dz = static_cast<unsigned>(a.dz), H = static_cast<unsigned>(a.H);
    const T* const from = a.z + std::uint64_t{b * H + h} * dz + feature;
#pragma unroll
    for (int i = 0; i < 4; ++i) z[i] = from[i];
#pragma unroll
    for (unsigned j = 0; j < 2; ++j) {
      const float *const g = a.gamma + (j * H + h) * dz + feature, *const s =
                                                                       a.beta + (j * H + h) * dz + feature;
#pragma unroll
      for (int i = 0; i < 4; ++i) gamma[j][i] = g[i], beta[j][i] = s[i];
    }
  }
  __device__ float2 turned(int pair, int query_or_key, float r, float scale, float2 turn) const {
    const auto one = [&](int i) {
      return to_float(z[i]) * r * ((1 + gamma[query_or_key][i]) * scale) + beta[query_or_key][i];
    };
    return rotate({one(2 * pair), one(2 * pair + 1)}, turn);
  }
};

// What a block has: the keys begin .. end - 1 of `keys`, and the thread's V columns from `column` on. A row
// of threads takes every rows-th key.
struct Work {
  int keys, begin, end, width, row, rows, column;  // width: columns of the block
  bool shares_keys;

  // bits: of the number of threads for the columns of the group blockIdx.y; split_bits: of the cluster's
  // size.
  template <int V>
  __device__ void set(int seen, int few, int bits, int split_bits) {
    keys = seen, shares_keys = keys > few;
    const int rank = static_cast<int>(blockIdx.z), t = static_cast<int>(threadIdx.x);
    const int share = shares_keys ? (keys + (1 << split_bits) - 1) >> split_bits : keys;
    begin = shares_keys ? min(rank * share, keys) : 0, end = min(begin + share, keys);
    const int mine = shares_keys ? bits : bits - split_bits;
    width = V << mine, row = t >> mine, rows = kThreads >> mine;
    column = (static_cast<int>(blockIdx.y) << bits) * V + (shares_keys ? 0 : rank * width) +
             (t & ((1 << mine) - 1)) * V;
  }
};

// A key's features are shared by a team of threads, V each in turn.
template <int V>
struct Team {
  int lanes, index, count, step, feature, packs;  // feature: a thread's first; packs: that it has of a key

  __device__ explicit Team(int features) {
    int bits = 0;
    while ((V << bits) < features && bits < 5) ++bits;
    lanes = 1 << bits, index = static_cast<int>(threadIdx.x) >> bits, count = kThreads >> bits;
    step = V << bits, feature = (static_cast<int>(threadIdx.x) & (lanes - 1)) * V;
    packs = (features + step - 1) >> (bits + (V == 8 ? 3 : 2));
  }
};

// Scores of the keys begin .. end - 1, which lie in `slots`, but for the newest.
template <class T, int V>
__device__ void score_keys(const Team<V>& team, int features, const float* query, const T* newest,
                           int newest_key, const uint4* slots, int begin, int end, float* score) {
#pragma unroll 1
  for (int first = begin; first < end; first += team.count, slots += team.packs * kThreads) {
    const int key = first + team.index;
    float of_key = 0;
#pragma unroll 1
    for (int at = team.feature, i = 0; at < features && key < end; at += team.step, ++i) {
      float q[V], k[V];
#pragma unroll
      for (int j = 0; j < V; ++j) q[j] = query[at + j];
      unpack<T, V>(
          read_pack(key == newest_key ? static_cast<const void*>(newest + at) : slots + i * kThreads), k);
#pragma unroll
      for (int j = 0; j < V; ++j) of_key += q[j] * k[j];
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      if (offset < team.lanes) of_key += __shfl_xor_sync(~0u, of_key, offset);
    }
    if (team.feature == 0 && key < end) score[key - begin] = of_key;
  }
  __syncthreads();
}

// The softmax over the keys of a query as a block goes through them, relative to the largest score so far.
struct TileSoftmax {
  float largest = -INFINITY, total = 0;  // total: the sum of exponentials

  // `weight` [count], for all threads to see, become the exponentials of further scores. Returns the factor
  // that what was summed before is to be taken by. Every warp finds the largest and the sum for itself.
  __device__ float add(const float* score, float* weight, int count) {
    const int t = static_cast<int>(threadIdx.x);
    float now = largest, sum = 0;
#pragma unroll 1
    for (int i = t % 32; i < count; i += 32) now = fmaxf(now, score[i]);
    now = warp_max(now);
#pragma unroll 1
    for (int i = t % 32; i < count; i += 32) sum += __expf(score[i] - now);
    if (t < count) weight[t] = __expf(score[t] - now);
    const float kept = __expf(largest - now);
    largest = now, total = total * kept + warp_sum(sum);
    __syncthreads();
    return kept;
  }
};

// Of each of `width` columns the sum over the rows of threads, where the first row's was.
template <int V>
__device__ void sum_rows(float* of_thread, int width) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += kThreads) {
    float all[4] = {};
#pragma unroll 1
    for (int at = i; at < kThreads * V; at += 4 * width) {
#pragma unroll
      for (int j = 0; j < 4; ++j) all[j] += at + j * width < kThreads * V ? of_thread[at + j * width] : 0;
    }
    of_thread[i] = (all[0] + all[1]) + (all[2] + all[3]);
  }
}

// The sum of what the `parts` blocks of a cluster have at `mine`, each by the factor that its lane holds.
__device__ float sum_of_blocks(const float* mine, int parts, float factor, bool is_wanted) {
  float sum = 0;
#pragma unroll
  for (int n = 0; n < static_cast<int>(kSplits); ++n) {
    const float f = __shfl_sync(~0u, factor, n);
    if (n < parts && is_wanted) sum += f * read_of_block(mine, static_cast<unsigned>(n));
  }
  return sum;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) attend(AttentionStep<T> a, int bits, int split_bits, int few) {
  extern __shared__ __align__(16) uint4 dynamic[];
  __shared__ float score[kTile], weight[kTile];
  __shared__ __align__(16) float of_thread[kThreads * V];
  __shared__ float of_block[2];  // largest score, sum of exponentials
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  const int dz = static_cast<int>(a.dz), dv = static_cast<int>(a.dv);
  const unsigned H = static_cast<unsigned>(a.H), b = blockIdx.x / H, h = blockIdx.x % H;
  uint4 *const value_slots = dynamic + t, *const key_slots =
                                              value_slots + kSlots * kThreads;               // kThreads apart
  float* const query = reinterpret_cast<float*>(dynamic + (kSlots + kKeySlots) * kThreads);  // [dz]
  T* const newest = reinterpret_cast<T*>(query + dz);                                        // [dz]

  const Team<V> team(dz);
  const int tile_keys = min(kKeySlots / team.packs * team.count, kTile);

  const std::uint64_t head = std::uint64_t{b} * H + h,
                      row_of_head = std::uint64_t{b} * static_cast<unsigned>(a.C) * H + h;
  Ring ring_k{reinterpret_cast<char*>(a.ring_k + row_of_head * static_cast<unsigned>(dz)),
              H * static_cast<unsigned>(dz * sizeof(T)), 0, static_cast<unsigned>(a.C)};
  Ring ring_v{reinterpret_cast<char*>(a.ring_v + row_of_head * static_cast<unsigned>(dv)),
              H * static_cast<unsigned>(dv * sizeof(T)), 0, static_cast<unsigned>(a.C)};

  Work work{};
  const auto value_at = [&](int key) -> const void* {
    return (key == work.keys - 1 ? reinterpret_cast<const T*>(a.v) + head * static_cast<unsigned>(dv)
                                 : reinterpret_cast<const T*>(ring_v.at(key))) +
           work.column;
  };
  const auto copy_keys = [&](int tile) {  // all but the newest
    uint4* to = key_slots;
#pragma unroll 1
    for (int key = tile + team.index; key < min(min(tile + tile_keys, work.end), work.keys - 1);
         key += team.count) {
#pragma unroll 1
      for (int at = team.feature, i = 0; at < dz; at += team.step, ++i)
        copy_pack(to + i * kThreads, reinterpret_cast<const T*>(ring_k.at(key)) + at);
      to += team.packs * kThreads;
    }
    end_group();
  };

  // What does not depend on the kernel before happens before the wait. That `start` is not of it is assumed:
  // if it has changed after the wait, it all happens again.
  const bool has_features = 4 * t < dz, warp_has_features = 4 * (t - lane) < dz;
  const auto position_of_stream = [&] {
    return static_cast<std::int64_t>(__ldcg(reinterpret_cast<const long long*>(a.start) + b));
  };
  Features<T> features;
  float2 turn[2];
  std::int64_t position = position_of_stream();
  for (bool has_waited = false;;) {
    const int in_chunk = remainder_of(position, a.chunk);
    work.template set<V>(in_chunk + 1, few, bits, split_bits);
    ring_k.first = ring_v.first = static_cast<unsigned>(remainder_of(position - in_chunk, a.C));
    if (has_features) {
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        turn[0] = turn[1];
        turn[1] = rotation(in_chunk, rope_frequency(a.log2_base, 2 * t + i, a.dz));
      }
    }
    if (!has_waited) {
      if (has_features && t % 8 == 0) {  // lines of 32 numbers
        const unsigned at = h * static_cast<unsigned>(dz) + 4 * t, other = at + H * static_cast<unsigned>(dz);
        prefetch(a.gamma + at), prefetch(a.gamma + other), prefetch(a.beta + at), prefetch(a.beta + other);
      }
      const int known = min(work.end, work.keys - 1);
#pragma unroll 1
      for (int key = work.begin + team.index; key < min(work.begin + tile_keys, known); key += team.count)
        if (team.feature < dz && team.feature % (8 * V) == 0)  // a line
          prefetch(reinterpret_cast<const T*>(ring_k.at(key)) + team.feature);
#pragma unroll 1
      for (int key = work.begin + work.row, u = 0; key < known && u < kSlots; key += work.rows, ++u)
        if (work.column < dv && work.column % min(work.width, 8 * V) == 0) prefetch(value_at(key));
      wait_for_previous();
      has_waited = true;
    }
    const std::int64_t now = position_of_stream();
    if (has_features) features.read(a, b, h, 4 * threadIdx.x);
    copy_keys(work.begin);
#pragma unroll 1
    for (int key = work.begin + work.row, u = 0; key < work.end && u < kSlots; key += work.rows, ++u) {
      if (work.column < dv) copy_pack(value_slots + u * kThreads, value_at(key));
      end_group();
    }
    if (now == position) break;
    position = now;
    wait_for_groups<0>();
  }
  // The columns that this block gives out: `share` of them from `first_out` on.
  const int share = work.width >> (work.shares_keys ? split_bits : 0);
  const int first_out = (static_cast<int>(blockIdx.y) << bits) * V + static_cast<int>(blockIdx.z) * share;
  const int out_end = min(share, dv - first_out);
  const T* const gates = a.gate + head * static_cast<unsigned>(dv) + first_out;
  T* const out = a.o + head * static_cast<unsigned>(dv) + first_out;
  T gate = t < out_end ? gates[t] : T{};

  if (warp_has_features) {
    float squares = 0;
    if (has_features) {
#pragma unroll
      for (int j = 0; j < 4; ++j) squares += to_float(features.z[j]) * to_float(features.z[j]);
    }
    const T* const z = a.z + head * static_cast<unsigned>(dz);
#pragma unroll 1
    for (int i = 4 * lane; i < dz; i += 128) {  // those of other warps
      if (i / 128 == t / 32) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) squares += to_float(z[i + j]) * to_float(z[i + j]);
    }
    const float scale = rsqrtf(static_cast<float>(dz)), r = rsqrtf(warp_sum(squares) * scale * scale + a.eps);
#pragma unroll
    for (int i = 0; i < 2 && has_features; ++i) {
      const float2 q = features.turned(i, 0, r, scale, turn[i]), k = features.turned(i, 1, r, scale, turn[i]);
      query[4 * t + 2 * i] = q.x, query[4 * t + 2 * i + 1] = q.y;
      newest[4 * t + 2 * i] = from_float<T>(k.x), newest[4 * t + 2 * i + 1] = from_float<T>(k.y);
    }
  }
  __syncthreads();

  float sum[V] = {};
  TileSoftmax softmax;
  int key = work.begin + work.row, slot = 0, consumed = kSlots;  // of this thread's next value; of the tile
  if (work.end - key <= (kSlots - 1) * work.rows) wait_for_groups<0>();
#pragma unroll 1
  for (int tile = work.begin; tile < work.end; tile += tile_keys) {
    const int tile_end = min(tile + tile_keys, work.end);
    // The keys' group is older than the last kSlots values', if as many came after it.
    if (consumed >= kSlots) {
      wait_for_groups<kSlots>();
    } else {
      wait_for_groups<0>();
    }
    score_keys<T, V>(team, dz, query, newest, work.keys - 1, key_slots, tile, tile_end, score);
    if (tile_end < work.end) copy_keys(tile_end);
    const float kept = softmax.add(score, weight, tile_end - tile);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] *= kept;

    consumed = 0;
#pragma unroll 1
    for (; key < tile_end; key += work.rows) {
      wait_for_groups<kSlots - 1>();
      uint4* const here = value_slots + slot * kThreads;
      if (work.column < dv) {
        const uint4 value = *here;
        const float w = weight[key - tile];
        float columns[V];
        unpack<T>(value, columns);
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += w * columns[j];
        if (key == work.keys - 1)
          *reinterpret_cast<uint4*>(reinterpret_cast<T*>(ring_v.at(key)) + work.column) = value;
        const int next = key + kSlots * work.rows;
        if (next < work.end) copy_pack(here, value_at(next));
      }
      end_group();
      slot = (slot + 1) % kSlots, ++consumed;
    }
  }
#pragma unroll
  for (int j = 0; j < V; j += 4)
    *reinterpret_cast<float4*>(of_thread + t * V + j) = {sum[j], sum[j + 1], sum[j + 2], sum[j + 3]};
  if (t == 0) of_block[0] = softmax.largest, of_block[1] = softmax.total;
  if (blockIdx.y == 0 && work.begin < work.end && work.end == work.keys &&
      (work.shares_keys || blockIdx.z == 0)) {
#pragma unroll 1
    for (int i = t; i < dz; i += kThreads) reinterpret_cast<T*>(ring_k.at(work.keys - 1))[i] = newest[i];
  }
  __syncthreads();
  if (work.rows > 1) sum_rows<V>(of_thread, work.width);

  float factor = 1,
        total = softmax.total;  // factor: by which the sums of a block, the lane's, are to be taken
  const bool is_joined = work.shares_keys;
  const int parts = is_joined ? 1 << split_bits : 1,
            from = is_joined ? static_cast<int>(blockIdx.z) * share : 0;
  if (is_joined) {
    cluster_sync();
    const unsigned other = static_cast<unsigned>(lane % parts);
    const float most_of_other = read_of_block(&of_block[0], other),
                total_of_other = read_of_block(&of_block[1], other);
    factor = __expf(most_of_other - warp_max(most_of_other));
    total = warp_sum(lane < parts ? factor * total_of_other : 0);
  }
#pragma unroll 1
  for (int begin = 0; begin < share; begin += kThreads) {
    const int i = begin + t;
    const bool is_out = i < out_end;
    const T next = i + kThreads < out_end ? gates[i + kThreads] : T{};
    const float o = is_joined ? sum_of_blocks(of_thread + from + i, parts, factor, is_out) : of_thread[i];
    if (is_out) out[i] = from_float<T>(__fdividef(o, total) * to_float(gate));
    gate = next;
  }
  if (is_joined) cluster_sync();  // no block ends while another reads its memory
}

}  // namespace

template <class T>
void attention_step(const AttentionStep<T>& a, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  constexpr std::int64_t kWanted = 256;  // blocks, two on each multiprocessor
  if (a.B == 0) return;
  int split_bits = is_hopper() ? 3 : 0, bits = 0;
  while ((1 << bits) < kThreads && (V << bits) < a.dv) ++bits;
  split_bits = bits < split_bits ? bits : split_bits;
  const auto blocks = [&] { return a.B * a.H * ceil_div(a.dv, V << bits) << split_bits; };
  while (bits > 5 && 2 * blocks() <= kWanted) --bits;
  while (split_bits > 0 && blocks() > kWanted) --split_bits;
  const std::size_t shared = static_cast<std::size_t>((kSlots + kKeySlots) * kThreads) * 16 +
                             static_cast<std::size_t>(a.dz) * (sizeof(float) + sizeof(T));
  allow_shared_memory(attend<T, V>, shared);
  cudaFuncSetAttribute(attend<T, V>, cudaFuncAttributePreferredSharedMemoryCarveout,
                       cudaSharedmemCarveoutMaxShared);
  const dim3 grid(grid_size(a.B * a.H), static_cast<unsigned>(ceil_div(a.dv, V << bits)), 1u << split_bits);
  launch_step({grid, kThreads, shared, stream, 1u << split_bits}, attend<T, V>, a, bits, split_bits,
              kFewKeys);
}

template void attention_step(const AttentionStep<float>&, cudaStream_t);
template void attention_step(const AttentionStep<Bfloat16>&, cudaStream_t);

}  // namespace megalodon::ops::cuda
