#include "ops/attention_step/cuda.h"

#include <cmath>

#include "ops/attention_step/kernel.h"
#include "ops/cuda_device.h"
#include "ops/cuda_step.h"
#include "ops/rope/cuda_rotation.h"

// A block has a head of a stream and a group of the columns of its values. It makes query and new key for
// itself and takes all the keys that the query sees, so that no block waits for another: keys are few of the
// bytes that are read, and come from memory for the first block of a head alone.
// While scores are made, the first values are on their way: enough of them that memory does not rest.
namespace megalodon::ops::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kTile = 1024;           // keys whose weights are in memory at once: all teams have some of it
constexpr int kKeys = 2, kPacks = 4;  // keys that are on their way to a thread, in registers; packs of each
constexpr int kSlots = 16;            // packs of values on their way to it, in shared memory

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
// Until no more than kLeft of this thread's groups are on their way. (__pipeline_wait_prior() leaves 8 at
// most.)
template <int kLeft>
__device__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ int remainder_of(std::int64_t x, std::int64_t by) {
  if (((x | by) >> 32) == 0) return static_cast<int>(static_cast<unsigned>(x) % static_cast<unsigned>(by));
  return static_cast<int>(x % by);
}

// Where a thread's part of the keys that a query sees lies, or of their values.
struct Ring {
  char* base;
  unsigned row_bytes, first, slots;

  __device__ char* at(int key) const {
    const unsigned slot = first + static_cast<unsigned>(key);
    return base + std::uint64_t{min(slot, slot - slots)} * row_bytes;  // the latter is negative: huge
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

// A key's features are shared by a team of threads: a pack each, as often as it takes, kPacks times a round.
template <int V>
struct Team {
  int lanes, count, index, first_of_warp;  // count: of teams
  int feature, step, rounds;               // feature: a thread's first; step: to its next pack

  __device__ explicit Team(int features) {
    int bits = 0;
    while ((kPacks * V << bits) < features && bits < 5) ++bits;
    const int t = static_cast<int>(threadIdx.x);
    lanes = 1 << bits, count = static_cast<int>(blockDim.x) >> bits;
    index = t >> bits, first_of_warp = (t & ~31) >> bits;
    feature = (t & (lanes - 1)) * V, step = V << bits;
    rounds = (features + kPacks * step - 1) >> (bits + (kPacks * V == 32 ? 5 : 4));
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kMostThreads) attend(AttentionStep<T> a, int bits) {
  extern __shared__ __align__(16) uint4 dynamic[];
  __shared__ float scores[2][kTile];                        // of tiles in turn; they become weights
  __shared__ __align__(16) float query[kMostStepFeatures];  // zeros from dz on
  __shared__ T newest[kMostStepFeatures];
  __shared__ float newest_score[kMostThreads / 32], largest_score[kMostThreads / 32],
      exponentials[kMostThreads / 32];  // of warps
  const int t = static_cast<int>(threadIdx.x), lane = t % 32, threads = static_cast<int>(blockDim.x);
  const int dz = static_cast<int>(a.dz), dv = static_cast<int>(a.dv);
  const unsigned H = static_cast<unsigned>(a.H), b = blockIdx.x / H, h = blockIdx.x % H;
  const std::uint64_t head = blockIdx.x;

  // A row of threads has the block's columns, V each, of every rows-th key.
  const int row = t >> bits, rows = threads >> bits, width = V << bits;
  const int first_column = static_cast<int>(blockIdx.y) * width, in_row = t & ((1 << bits) - 1);
  const int column = first_column + in_row * V;
  const bool has_columns = column < dv;

  // Packs in memory: slots of a thread, `threads` apart, then the gates' and the newest value's of a row.
  uint4 *const slots = dynamic + t, *const gates = dynamic + kSlots * threads;
  uint4* const newest_value = gates + threads;
  float* const of_thread = reinterpret_cast<float*>(newest_value + threads);  // [rows, width]
#pragma unroll 1
  for (int i = dz + t; i < kMostStepFeatures; i += threads) query[i] = 0;

  const Team<V> team(dz);
  const std::uint64_t row_of_head = std::uint64_t{b} * static_cast<unsigned>(a.C) * H + h;
  Ring ring_k{reinterpret_cast<char*>(a.ring_k + row_of_head * static_cast<unsigned>(dz) + team.feature),
              H * static_cast<unsigned>(dz * sizeof(T)), 0, static_cast<unsigned>(a.C)};
  Ring ring_v{reinterpret_cast<char*>(a.ring_v + row_of_head * static_cast<unsigned>(dv) + column),
              H * static_cast<unsigned>(dv * sizeof(T)), 0, static_cast<unsigned>(a.C)};

  int known;  // keys before the newest
  uint4 keys[kKeys][kPacks];
  const auto read_keys = [&](int first, int round) {
    const int at = round * kPacks * team.step;
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      const int key = first + u * team.count + team.index;
      const T* const from = reinterpret_cast<const T*>(ring_k.at(key)) + at;
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
        keys[u][p] =
            key < known && team.feature + at + p * team.step < dz ? read_pack(from + p * team.step) : uint4{};
    }
  };

  // What does not depend on the kernel before happens before the wait. That `start` is not of it is assumed:
  // if it has changed after the wait, it all happens again.
  const bool has_features = 4 * t < dz, warp_has_features = 4 * (t - lane) < dz;
  const auto position_of_stream = [&] {
    return static_cast<std::int64_t>(__ldcg(reinterpret_cast<const long long*>(a.start) + b));
  };
  std::int64_t position = position_of_stream();
  double frequency[2] = {};
  if (has_features) {
#pragma unroll
    for (int i = 0; i < 2; ++i) frequency[i] = rope_frequency(a.log2_base, 2 * t + i, a.dz);
    if (t % 8 == 0) {  // lines of 32 numbers
      const unsigned at = h * static_cast<unsigned>(dz) + 4 * t, other = at + H * static_cast<unsigned>(dz);
      prefetch(a.gamma + at), prefetch(a.gamma + other), prefetch(a.beta + at), prefetch(a.beta + other);
    }
  }
  Features<T> features;
  float2 turn[2];
  for (bool has_waited = false;; has_waited = true) {
    known = remainder_of(position, a.chunk);
    ring_k.first = ring_v.first = static_cast<unsigned>(remainder_of(position - known, a.C));
    if (has_features) {
#pragma unroll
      for (int i = 0; i < 2; ++i) turn[i] = rotation(known, frequency[i]);
    }
    if (!has_waited) wait_for_previous();
    const std::int64_t now = position_of_stream();
    if (has_features) features.read(a, b, h, 4 * threadIdx.x);
    read_keys(0, 0);
    if (row == 0 && has_columns) {
      const std::uint64_t from = head * static_cast<unsigned>(dv) + static_cast<unsigned>(column);
      copy_pack(gates + in_row, a.gate + from), copy_pack(newest_value + in_row, a.v + from);
    }
    end_group();
#pragma unroll 1
    for (int key = row, u = 0; key < known && u < kSlots; key += rows, ++u) {
      if (has_columns) copy_pack(slots + u * threads, ring_v.at(key));
      end_group();
    }
    if (now == position) break;
    position = now;
    wait_for_groups<0>();
  }

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
    float score = 0;
#pragma unroll
    for (int i = 0; i < 2 && has_features; ++i) {
      const float2 q = features.turned(i, 0, r, scale, turn[i]), k = features.turned(i, 1, r, scale, turn[i]);
      const T x = from_float<T>(k.x), y = from_float<T>(k.y);
      query[4 * t + 2 * i] = q.x, query[4 * t + 2 * i + 1] = q.y;
      newest[4 * t + 2 * i] = x, newest[4 * t + 2 * i + 1] = y;
      score += q.x * to_float(x) + q.y * to_float(y);
    }
    score = warp_sum(score);
    if (lane == 0) newest_score[t / 32] = score;
  }
  __syncthreads();

  // The softmax as the block goes through the keys, relative to the largest score so far, with the newest
  // key's at first; a thread has a share of the sum of exponentials.
  float score_of_newest = 0;
#pragma unroll 1
  for (int i = 0; 128 * i < dz; ++i) score_of_newest += newest_score[i];
  float largest = score_of_newest, total = t == 0 ? 1 : 0, sum[V] = {};
  if (blockIdx.y == 0) {
    T* const to = reinterpret_cast<T*>(ring_k.at(known)) - team.feature;
#pragma unroll 1
    for (int i = t; i < dz; i += threads) to[i] = newest[i];
  }

  uint4* slot = slots;
  int next_value = has_columns ? row : known;
#pragma unroll 1
  for (int tile = 0; tile < known; tile += kTile) {
    const int tile_end = min(tile + kTile, known);
    float* const weight = scores[tile / kTile % 2];
    float now = largest;
#pragma unroll 1
    for (int first = tile, next; first + team.first_of_warp < tile_end; first = next) {
      next = min(first + kKeys * team.count, tile + kTile);
      float score[kKeys] = {};
#pragma unroll 1
      for (int round = 0; round < team.rounds; ++round) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          const int at = team.feature + (round * kPacks + p) * team.step;
          float q[V];
#pragma unroll
          for (int j = 0; j < V; j += 4)
            *reinterpret_cast<float4*>(q + j) = *reinterpret_cast<const float4*>(query + at + j);
#pragma unroll
          for (int u = 0; u < kKeys; ++u) {
            float k[V];
            unpack<T>(keys[u][p], k);
#pragma unroll
            for (int j = 0; j < V; ++j) score[u] += q[j] * k[j];
          }
        }
        const bool is_last = round + 1 == team.rounds;
        read_keys(is_last ? next : first, is_last ? 0 : round + 1);
      }
#pragma unroll 1
      for (int offset = team.lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int u = 0; u < kKeys; ++u) score[u] += __shfl_xor_sync(~0u, score[u], offset);
      }
#pragma unroll
      for (int u = 0; u < kKeys; ++u) {
        const int key = first + u * team.count + team.index;
        if (key >= tile_end) continue;
        if (team.feature == 0) weight[key - tile] = score[u];
        now = fmaxf(now, score[u]);
      }
    }
    now = warp_max(now);
    if (lane == 0) largest_score[t / 32] = now;
    __syncthreads();
    now = warp_max(largest_score[lane & (threads / 32 - 1)]);
    const float kept = __expf(largest - now);
    largest = now, total *= kept;
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] *= kept;
#pragma unroll 1
    for (int i = t; i < tile_end - tile; i += threads) {
      const float w = __expf(weight[i] - now);
      weight[i] = w, total += w;
    }
    __syncthreads();

    if (row + (kSlots - 1) * rows >= known) wait_for_groups<0>();  // not all slots are in use
#pragma unroll 1
    for (; next_value < tile_end; next_value += rows) {
      wait_for_groups<kSlots - 1>();
      float value[V];
      unpack<T>(*slot, value);
      const float w = weight[next_value - tile];
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += w * value[j];
      const int key = next_value + kSlots * rows;
      if (key < known) copy_pack(slot, ring_v.at(key));
      end_group();
      slot = slot == slots + (kSlots - 1) * threads ? slots : slot + threads;
    }
  }

  wait_for_groups<0>();
  if (row == 0 && has_columns) {
    const uint4 pack = newest_value[in_row];
    *reinterpret_cast<uint4*>(ring_v.at(known)) = pack;
    const float w = __expf(score_of_newest - largest);
    float value[V];
    unpack<T>(pack, value);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += w * value[j];
  }
#pragma unroll
  for (int j = 0; j < V; j += 4)
    *reinterpret_cast<float4*>(of_thread + t * V + j) = {sum[j], sum[j + 1], sum[j + 2], sum[j + 3]};
  total = warp_sum(total);
  if (lane == 0) exponentials[t / 32] = total;
  __syncthreads();
  total = warp_sum(lane < threads / 32 ? exponentials[lane] : 0);
  T* const out = a.o + head * static_cast<unsigned>(dv) + first_column;
#pragma unroll 1
  for (int i = t; i < min(width, dv - first_column); i += threads) {
    float o = 0;
#pragma unroll 4
    for (int r = 0; r < rows; ++r) o += of_thread[r * width + i];
    out[i] = from_float<T>(__fdividef(o, total) * to_float(reinterpret_cast<const T*>(gates)[i]));
  }
}

}  // namespace

template <class T>
void attention_step(const AttentionStep<T>& a, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T), kLine = 3;  // log2 of a line's packs
  constexpr std::size_t kLarge = 176 * 1024;    // shared memory that the largest blocks take
  if (a.B == 0) return;
  const std::int64_t heads = a.B * a.H;
  std::int64_t places = 0;  // for blocks at once
  std::size_t shared = 0;
  int threads = 0;
  const auto set = [&](int count) {
    threads = count;
    shared = static_cast<std::size_t>(threads) * ((kSlots + 2) * sizeof(uint4) + V * sizeof(float));
    allow_all_shared_memory(attend<T, V>, shared);
    places = resident_blocks(attend<T, V>, static_cast<unsigned>(threads), shared);
  };
  set(most_shared_memory() >= kLarge ? kMostThreads : kMostThreads / 2);
  if (heads > places) set(kMostThreads / 2);
  // As few columns a block as all blocks at once allow, but lines.
  int bits = 0;
  while ((1 << bits) < threads && (V << bits) < a.dv) ++bits;
  while (bits > kLine && 2 * heads * ceil_div(a.dv, V << bits) <= places) --bits;
  const dim3 grid(grid_size(heads), static_cast<unsigned>(ceil_div(a.dv, V << bits)));
  launch_step({grid, static_cast<unsigned>(threads), shared, stream}, attend<T, V>, a, bits);
}

template void attention_step(const AttentionStep<float>&, cudaStream_t);
template void attention_step(const AttentionStep<Bfloat16>&, cudaStream_t);

}  // namespace megalodon::ops::cuda
