#include "ops/skinny_linear/cuda.h"

#include <cuda_pipeline.h>

#include <algorithm>
#include <bit>

#include "ops/cuda_device.h"
#include "ops/cuda_step.h"

// Products of few rows are the reading of their weights. A cluster of blocks makes some tiles of 16 outputs
// of all rows, or of 8 where each is of two products; its blocks share the features, and so do a block's
// warps. Weights come through a ring of each warp in shared memory, filled before x is there; x waits in the
// registers from which the tensor cores take it. A kernel leaves room for the next one on its multiprocessor,
// whose ring so fills in the meantime. As the order of a sum's terms is free, the two operands agree that a
// thread has 8 neighbouring features.
namespace megalodon::ops::cuda {
namespace {

constexpr int kTile = 16;                  // outputs
constexpr int kUnit = 64;                  // features: a line of memory of each output
constexpr int kChunk = 32;                 // features: 8 of each thread of a row
constexpr int kPitch = 20;                 // of a row's sums of a tile, so that rows lie in other banks
constexpr int kGroup = 12;                 // tiles whose sums wait for those of other blocks
constexpr int kPacks = kTile * kUnit / 8;  // of 16 bytes in a unit
constexpr int kWarps = 8;                  // of a block
constexpr int kMostInput = 40 << 10;  // bytes of x in a block's shared memory, before more blocks share it
constexpr int kMostCluster = 8;

// For N groups of 8 rows: units of a warp under way.
template <int N>
constexpr int kSlots = N == 1   ? 5
                       : N == 2 ? 4
                                : 3;

// d += a b, a [16, 16], b [16, 8].
__device__ void multiply_add(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                             unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ bool has_same_input(const SkinnyLayer& a, const SkinnyLayer& b) {
  return a.x == b.x && a.norm == b.norm && a.norm_weight == b.norm_weight && a.norm_bias == b.norm_bias;
}

// 16 outputs of a layer, from `first` on, or 8 of two products.
struct Tile {
  int layer, outputs, first;  // layer: its index (addresses of parameters would be read through the caches)

  __device__ Tile(const SkinnyCall& c, unsigned index) : layer(0) {
#pragma unroll 1
    while (layer + 1 < c.layers && index >= c.layer[layer + 1].first_tile) ++layer;
    outputs = c.layer[layer].up != nullptr ? kTile / 2 : kTile;
    first = static_cast<int>(index - c.layer[layer].first_tile) * outputs;
  }
};

// How the work is shared among the blocks of a launch.
struct Shares {
  unsigned tiles, more;  // of a cluster, and one more of the first `more` clusters
  int units;             // of a block: 64 features
  int row_bits;          // sums have places for 2^row_bits rows
  bool has_norm;         // a layer, so that there is room for it
  __device__ int places() const { return kTile << row_bits; }
};

// A block's: the tiles of its cluster, the units of its features, and of these every so many of each warp.
struct Share {
  const SkinnyCall& call;
  unsigned first_tile, end_tile;
  int first_unit, units, warp, warps;

  __device__ Share(const SkinnyCall& c, const Shares& of)
      : call(c),
        first_tile(blockIdx.x * of.tiles + min(blockIdx.x, of.more)),
        end_tile(first_tile + of.tiles + (blockIdx.x < of.more)),
        first_unit(static_cast<int>(blockIdx.z) * of.units),
        units(max(0, min(of.units, (c.width + kUnit - 1) / kUnit - first_unit))),
        warp(static_cast<int>(threadIdx.x) / 32),
        warps(static_cast<int>(blockDim.x) / 32) {}
  // The tiles from `tile` on whose outputs are made together.
  __device__ int group(unsigned tile) const { return min(static_cast<int>(end_tile - tile), kGroup); }
  // The warp's unit i, and of its half h the first feature.
  __device__ int unit(int i) const { return warp + i * warps; }
  __device__ bool has(int i) const { return unit(i) < units; }
  __device__ int feature(int i, int h) const { return (first_unit + unit(i)) * kUnit + h * kChunk; }
  __device__ bool has(int i, int h) const { return has(i) && feature(i, h) < call.width; }
  // Of the warp.
  __device__ int features() const {
    int count = 0;
#pragma unroll 1
    for (int i = 0; has(i); ++i) count += has(i, 1) ? kUnit : kChunk;
    return count;
  }
};

// Where a row's pack of 8 features is in a unit: the same packs of neighbouring rows lie in other banks.
__device__ int place(int row, int pack) {
  return row * (kUnit / 8) + (pack ^ row % 2 * 4);
}

// A warp's weights on their way into its ring, unit by unit of a tile, then of the next tile. A thread brings
// one pack of every fourth row.
class Weights {
 public:
  __device__ Weights(const Share& share, uint4* ring)
      : s_(share), ring_(ring), row_(static_cast<int>(threadIdx.x) % 32 / 8), pack_(threadIdx.x % 8) {
    unit_ = s_.warp;
    tile_ = unit_ < s_.units ? s_.first_tile : s_.end_tile;
    find_rows();
  }
  // The next unit; to be waited for as one group, which is empty after the last.
  __device__ void start(int slot) {
    next([&](int row, const Bfloat16* from, bool there) {
      copy_pack(ring_ + slot * kPacks + place(row, pack_), from, there);
    });
    __pipeline_commit();
  }
  // The next unit into the second cache only.
  __device__ void fetch() {
    next([&](int, const Bfloat16* from, bool there) {
      if (there && pack_ == 0) prefetch(from);
    });
  }

 private:
  template <class F>
  __device__ void next(F&& f) {
    if (tile_ >= s_.end_tile) return;
    const int feature = (s_.first_unit + unit_) * kUnit + 8 * pack_;
    const bool there = feature < s_.call.width;
    const int step = there ? 4 * s_.call.width : 0, at = there ? feature : 0;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const bool has_low = low_rows_ > 4 * q, has_high = high_rows_ > 4 * q;
      f(row_ + 4 * q, low_ + (has_low ? q * step + at : 0), there && has_low);
      f(row_ + 4 * q + 8, high_ + (has_high ? q * step + at : 0), there && has_high);
    }
    unit_ += s_.warps;
    if (unit_ < s_.units) return;
    unit_ = s_.warp;
    ++tile_;
    find_rows();
  }
  __device__ void find_rows() {
    if (tile_ >= s_.end_tile) return;
    const Tile tile(s_.call, tile_);
    const SkinnyLayer& layer = s_.call.layer[tile.layer];
    const int low = tile.first + row_, high = layer.up != nullptr ? low : low + kTile / 2;
    low_rows_ = layer.out - low, high_rows_ = layer.out - high;
    const auto row = [&](const Bfloat16* matrix, int out) {
      return matrix + std::int64_t{out < layer.out ? out : 0} * s_.call.width;
    };
    low_ = row(layer.weight, low), high_ = row(layer.up != nullptr ? layer.up : layer.weight, high);
  }

  const Share& s_;
  uint4* ring_;
  const int row_, pack_;
  int unit_;
  unsigned tile_;
  const Bfloat16 *low_ = nullptr, *high_ = nullptr;  // a row of the tile's first 8, and of its others
  int low_rows_ = 0, high_rows_ = 0;                 // from there to the end of the layer
};

__device__ void unpack(const uint4& pack, float (&to)[8]) {
  const unsigned word[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    to[2 * i] = __uint_as_float(word[i] << 16), to[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
}
__device__ uint4 pack(const float (&from)[8]) {
  uint4 packed;
  store(from, reinterpret_cast<Bfloat16*>(&packed));
  return packed;
}

// Of `count` numbers: their mean and the sum of the squares of their distances to it.
struct Moments {
  float count, mean, squares;
};
// Of all of some sets; the sums are of `sets` terms in their order. In RMS norm means count as 0.
template <class F>
__device__ Moments join(int sets, F&& moments) {
  float count = 0, sum = 0, squares = 0;
#pragma unroll 4
  for (int i = 0; i < sets; ++i) {
    const Moments m = moments(i);
    count += m.count, sum += m.count * m.mean;
  }
  const float mean = count > 0 ? __fdividef(sum, count) : 0;
#pragma unroll 4
  for (int i = 0; i < sets; ++i) {
    const Moments m = moments(i);
    squares += m.squares + m.count * (m.mean - mean) * (m.mean - mean);
  }
  return {count, mean, squares};
}

__device__ float sum(const float (&v)[8]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}
// The norm of a warp's features on its way into shared memory: [units, 64] of the weight and of the bias.
class Norm {
 public:
  __device__ Norm(const Share& share, uint4* shared) : s_(share), shared_(shared) {}
  // That of the first of the block's layers which has one. To be waited for with the first weights.
  __device__ void start_first() {
    const int last = Tile(s_.call, s_.end_tile - 1).layer;
    int layer = Tile(s_.call, s_.first_tile).layer;
    while (layer < last && s_.call.layer[layer].norm == InputNorm::none) ++layer;
    if (s_.call.layer[layer].norm != InputNorm::none) start(layer);
  }
  // That of a layer, for the whole warp.
  __device__ void prepare(int layer) {
    if (!is_of(layer)) {
      __syncwarp();
      start(layer);
      __pipeline_commit();
      __pipeline_wait_prior(0);
    }
    __syncwarp();
  }
  // 8 weights and biases from a feature of unit i on.
  __device__ void get(int i, int from, float (&weight)[8], float (&bias)[8]) const {
    const float* const at = reinterpret_cast<const float*>(shared_ + s_.unit(i) * 32) + from;
    const auto read = [](const float* values, float (&to)[8]) {
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(values + j);
        to[j] = four.x, to[j + 1] = four.y, to[j + 2] = four.z, to[j + 3] = four.w;
      }
    };
    read(at, weight), read(at + kUnit, bias);
  }

 private:
  __device__ bool is_of(int layer) const {
    const SkinnyLayer &a = s_.call.layer[layer], &b = s_.call.layer[max(layer_, 0)];
    return layer_ >= 0 && a.norm_weight == b.norm_weight && a.norm_bias == b.norm_bias;
  }
  // Zeros where there is none. Half the lanes bring weights, half biases.
  __device__ void start(int layer) {
    const int lane = static_cast<int>(threadIdx.x) % 32, pack = 4 * (lane % 16);
    const float* const from = lane < 16 ? s_.call.layer[layer].norm_weight : s_.call.layer[layer].norm_bias;
#pragma unroll 1
    for (int i = 0; s_.has(i); ++i) {
      const int feature = s_.feature(i, 0) + pack;
      const bool there = from != nullptr && feature < s_.call.width;
      copy_pack(shared_ + s_.unit(i) * 32 + lane, there ? from + feature : from, there);
    }
    layer_ = layer;
  }

  const Share& s_;
  uint4* const shared_;
  int layer_ = -1;
};

// x as the tensor cores take it: thread (g, t) has rows 8 n + g, 8 neighbouring features of each half of its
// warp's units. N groups of rows, M units in registers, where each thread brings and normalises its own; or,
// M 0, in shared memory, where the threads of a warp share the halves of the rows that there are.
template <int N, int M>
class Input {
 public:
  __device__ Input(const Share& share, int row_bits, uint4* shared)
      : s_(share),
        shared_(shared),
        g_(static_cast<int>(threadIdx.x) % 32 / 4),
        t_(threadIdx.x % 4),
        row_bits_(M > 0 ? 3 : row_bits) {}

  // That of a layer, for all threads of the cluster; `scratch` [warps, 8 N] is free again when the block has
  // met next.
  __device__ void read(int layer, Norm& norm, Moments* scratch) {
    constexpr int kAtOnce = M > 0 ? 2 * M : 4;
    const Bfloat16* const from = s_.call.layer[layer].x;
#pragma unroll 1
    for (int first = first_half(); s_.has(first / 2); first += kAtOnce * half_step()) {
      uint4 x[kAtOnce][N];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int half = first + k * half_step(), i = half / 2, h = half % 2;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          x[k][n] = {0, 0, 0, 0};
          if (s_.has(i, h) && row(n) < s_.call.rows)
            x[k][n] =
                *reinterpret_cast<const uint4*>(from + row(n) * s_.call.width + s_.feature(i, h) + 8 * t_);
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int half = M > 0 ? k : first + k * half_step();
#pragma unroll
        for (int n = 0; n < N; ++n) {
          if (M > 0 || s_.has(half / 2)) set(half / 2, half % 2, n, x[k][n]);
        }
      }
    }
    const InputNorm kind = s_.call.layer[layer].norm;
    if (kind != InputNorm::none) {
      __pipeline_wait_prior(kSlots<N> - 1);
      norm.prepare(layer);
      normalise(kind, norm, scratch);
    }
    if constexpr (M == 0) __syncwarp();
  }
  __device__ uint4 get(int i, int h, int n) const {
    if constexpr (M > 0) {
      return kept_[i][h][n];
    } else {
      return g_ < s_.call.rows ? *at(i, h, g_) : uint4{0, 0, 0, 0};
    }
  }
  // f(i) for the units of the warp.
  template <class F>
  __device__ void for_units(F&& f) const {
    if constexpr (M > 0) {
#pragma unroll
      for (int i = 0; i < M; ++i) {
        if (s_.has(i)) f(i);
      }
    } else {
#pragma unroll 1
      for (int i = 0; s_.has(i); ++i) f(i);
    }
  }

 private:
  static_assert(M > 0 || N == 1);

  // What the thread brings and normalises: of some rows every so many halves of units.
  __device__ int row(int n) const { return 8 * n + (g_ & ((1 << row_bits_) - 1)); }
  __device__ int first_half() const { return M > 0 ? 0 : g_ >> row_bits_; }
  __device__ int half_step() const { return M > 0 ? 1 : 8 >> row_bits_; }
  __device__ uint4* at(int i, int h, int row) const {  // [units, 2, rows, 4] of the block
    return shared_ + ((2 * s_.unit(i) + h) * s_.call.rows + row) * 4 + t_;
  }
  __device__ void set(int i, int h, int n, const uint4& x) {
    if constexpr (M > 0) {
      kept_[i][h][n] = x;
    } else if (row(n) < s_.call.rows) {
      *at(i, h, row(n)) = x;
    }
  }
  template <class F>  // f(i, h) for the thread's halves that are there
  __device__ void for_halves(F&& f) const {
    if constexpr (M > 0) {
#pragma unroll
      for (int half = 0; half < 2 * M; ++half) {
        if (s_.has(half / 2, half % 2)) f(half / 2, half % 2);
      }
    } else {
#pragma unroll 1
      for (int half = first_half(); s_.has(half / 2); half += half_step()) {
        if (s_.has(half / 2, half % 2)) f(half / 2, half % 2);
      }
    }
  }
  __device__ void values(int i, int h, int n, float (&to)[8]) const {
    if constexpr (M > 0) {
      unpack(kept_[i][h][n], to);
    } else {
      unpack(row(n) < s_.call.rows ? *at(i, h, row(n)) : uint4{0, 0, 0, 0}, to);
    }
  }
  // Of a warp's threads with the same rows.
  __device__ float row_sum(float x) const {
    x += __shfl_xor_sync(~0u, x, 1);
    x += __shfl_xor_sync(~0u, x, 2);
    for (int offset = 4 << row_bits_; offset < 32; offset *= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
  }

  // Mean and reciprocal deviation of the thread's rows.
  __device__ void moments(InputNorm kind, Moments* scratch, float2 (&of_row)[N]) {
    __shared__ Moments of_block[2][8 * N];  // one is written while other blocks may still read the other
    const int thread = static_cast<int>(threadIdx.x);
    const float count = static_cast<float>(s_.features());
    float mean[N] = {}, squares[N] = {}, v[8];
    if (kind == InputNorm::layer) {
      for_halves([&](int i, int h) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          values(i, h, n, v);
          mean[n] += sum(v);
        }
      });
#pragma unroll
      for (int n = 0; n < N; ++n) mean[n] = __fdividef(row_sum(mean[n]), fmaxf(count, 1));
    }
    for_halves([&](int i, int h) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        values(i, h, n, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = (v[j] - mean[n]) * (v[j] - mean[n]);
        squares[n] += sum(v);
      }
    });
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float all = row_sum(squares[n]);
      if (t_ == 0 && g_ >> row_bits_ == 0) scratch[s_.warp * 8 * N + row(n)] = {count, mean[n], all};
    }
    __syncthreads();
    auto& here = of_block[turn_++ % 2];
    if (thread < 8 * N) here[thread] = join(s_.warps, [&](int w) { return scratch[w * 8 * N + thread]; });
    cluster_sync();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Moments& mine = here[row(n)];
      const Moments all = gridDim.z == 1 ? mine : join(static_cast<int>(gridDim.z), [&](int block) {
        return Moments{read_of_block(&mine.count, block), read_of_block(&mine.mean, block),
                       read_of_block(&mine.squares, block)};
      });
      of_row[n] = {all.mean, rsqrtf(__fdividef(all.squares, all.count) + s_.call.eps)};
    }
  }

  __device__ void normalise(InputNorm kind, const Norm& norm, Moments* scratch) {
    float2 of_row[N];
    moments(kind, scratch, of_row);
    for_halves([&](int i, int h) {
      float weight[8], bias[8], v[8];
      norm.get(i, h * kChunk + 8 * t_, weight, bias);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        values(i, h, n, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = (v[j] - of_row[n].x) * of_row[n].y * (1 + weight[j]) + bias[j];
        set(i, h, n, pack(v));
      }
    });
  }

  const Share& s_;
  uint4* const shared_;
  const int g_, t_, row_bits_;
  int turn_ = 0;  // inputs that were normalised
  uint4 kept_[M > 0 ? M : 1][2][N];
};

// A place of a group's sums [tiles, 2^row_bits, kTile], and what joins the sum to make an output.
struct Output {
  int layer = -1;  // none
  std::int64_t at = 0;
  float bias = 0, added = 0;

  Output() = default;
  __device__ Output(const SkinnyCall& c, const Shares& shares, unsigned first_tile, int tiles, int index) {
    const int tile = index >> shares.row_bits >> 4, row = (index & shares.places() - 1) / kTile;
    if (tile >= tiles || row >= c.rows) return;
    const Tile of(c, first_tile + tile);
    const int own = index % kTile, out = of.first + own;
    if (own >= of.outputs || out >= c.layer[of.layer].out) return;
    layer = of.layer, at = std::int64_t{row} * c.layer[layer].out + out;
    if (c.layer[layer].bias != nullptr) bias = c.layer[layer].bias[out];
  }
  __device__ void read_added(const SkinnyCall& c) {
    if (layer >= 0 && c.layer[layer].add != nullptr) added = to_float(c.layer[layer].add[at]);
  }
  // `totals`: the block's own sum at the place.
  __device__ void write(const SkinnyCall& c, const float* totals) const {
    if (layer < 0) return;
    float y = bias, up = 0;
    const bool has_up = c.layer[layer].up != nullptr;
#pragma unroll 4
    for (unsigned block = 0; block < gridDim.z; ++block) {
      y += read_of_block(totals, block);
      if (has_up) up += read_of_block(totals + kTile / 2, block);
    }
    if (c.layer[layer].silu) y = __fdividef(y, 1 + __expf(-y));
    if (has_up) y *= up;
    c.layer[layer].y[at] = from_float<Bfloat16>(y + added);
  }
};

template <int N, int M>
__global__ void __launch_bounds__(kWarps * 32, N == 1 ? 3 : 2)
    forward(const __grid_constant__ SkinnyCall c, const __grid_constant__ Shares shares) {
  // Of each warp the ring [kSlots, kTile, kUnit]; sums [warps, 8 N, kPitch] and [kGroup, 2^row_bits, kTile];
  // the norm; x.
  extern __shared__ uint4 shared[];
  let_next_start();
  const Share share(c, shares);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int g = thread % 32 / 4, t = thread % 4;
  uint4* const ring = shared + share.warp * kSlots<N> * kPacks;
  float* const sums = reinterpret_cast<float*>(shared + share.warps * kSlots<N> * kPacks);
  float* const totals = sums + share.warps * 8 * N * kPitch;
  auto* const of_features = reinterpret_cast<uint4*>(totals + kGroup * shares.places());
  Norm norm(share, of_features);
  Input<N, M> input(share, shares.row_bits,
                    of_features + (shares.has_norm ? shares.units * 2 * kUnit / 4 : 0));

  if (shares.has_norm) norm.start_first();
  Weights weights(share, ring);
#pragma unroll 1
  for (int slot = 0; slot < kSlots<N>; ++slot) weights.start(slot);
  Weights ahead = weights;
#pragma unroll 1
  for (int slot = 0; slot < kSlots<N>; ++slot) ahead.fetch();
  // What joins the outputs is read early where they are few.
  constexpr int kAtOnce = N == 1 ? 1 : 4;
  const int first_place = static_cast<int>(blockIdx.z) * threads + thread;
  const auto output = [&](unsigned tile, int place) {
    return Output(c, shares, tile, share.group(tile), place);
  };
  Output outputs[kAtOnce];
  if (kAtOnce == 1) outputs[0] = output(share.first_tile, first_place);
  wait_for_previous();
  if (kAtOnce == 1) outputs[0].read_added(c);

  int read = -1;  // the layer whose input is there
  int slot = 0;
  for (unsigned begin = share.first_tile; begin < share.end_tile; begin += kGroup) {
    for (int tile = 0; tile < share.group(begin); ++tile) {
      const int layer = Tile(c, begin + tile).layer;
      if (read < 0 || !has_same_input(c.layer[read], c.layer[layer]))
        input.read(layer, norm, reinterpret_cast<Moments*>(sums));
      read = layer;

      constexpr int S = 4 / N;  // sums side by side
      float sum[N][S][4] = {};
      input.for_units([&](int i) {
        __pipeline_wait_prior(kSlots<N> - 1);
        __syncwarp();
        uint4 a[2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          a[h][0] = ring[slot * kPacks + place(g, 4 * h + t)];
          a[h][1] = ring[slot * kPacks + place(g + 8, 4 * h + t)];
        }
        __syncwarp();
        weights.start(slot);
        slot = slot + 1 == kSlots<N> ? 0 : slot + 1;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int n = 0; n < N; ++n) {
            const uint4 low = a[h][0], high = a[h][1], b = input.get(i, h, n);
            multiply_add(sum[n][2 * h % S], low.x, high.x, low.y, high.y, b.x, b.y);
            multiply_add(sum[n][(2 * h + 1) % S], low.z, high.z, low.w, high.w, b.z, b.w);
          }
        }
      });
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float all = 0;
#pragma unroll
          for (int s = 0; s < S; ++s) all += sum[n][s][j];
          sums[(share.warp * 8 * N + 8 * n + 2 * t + j % 2) * kPitch + g + j / 2 * 8] = all;
        }
      }
      __syncthreads();
      for (int i = thread; i < c.rows * kTile; i += threads) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          if (w < share.warps) total += sums[(w * 8 * N + i / kTile) * kPitch + i % kTile];
        }
        totals[tile * shares.places() + i] = total;
      }
      __syncthreads();
    }
    cluster_sync();
    const int step = static_cast<int>(gridDim.z) * threads, end = share.group(begin) * shares.places();
    for (int place = first_place; place < end; place += kAtOnce * step) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (kAtOnce == 1 && begin == share.first_tile && place == first_place) continue;
        outputs[k] = output(begin, place + k * step);
        outputs[k].read_added(c);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) outputs[k].write(c, totals + place + k * step);
    }
    wait_for_readers();
  }
}

// How a row's units are shared, and how many rows a launch takes.
struct Layout {
  int blocks, warps, rows, units;  // blocks of a cluster; warps and units of a block
  std::size_t shared;              // bytes
};

// With x in registers or, M 0, in shared memory. No rows if it does not fit.
template <int N, int M>
Layout layout(const SkinnyCall& c, bool has_norm, int most_shared) {
  const int units = (c.width + kUnit - 1) / kUnit, most_blocks = is_hopper() ? kMostCluster : 1;
  Layout l{.blocks = 1, .warps = kWarps, .rows = std::min(c.rows, 8 * N), .units = units, .shared = 0};
  const auto input_bytes = [&] { return l.units * kUnit * 2 * l.rows; };
  const auto fits = [&] { return M > 0 ? l.units <= M * kWarps : input_bytes() <= kMostInput; };
  while (l.blocks < most_blocks && !fits()) {
    l.blocks *= 2;
    l.units = (units + l.blocks - 1) / l.blocks;
  }
  if (M > 0 && !fits()) l.rows = 0;
  l.warps = std::min(l.units, kWarps);
  const auto bytes = [&] {
    return l.warps * (kSlots<N> * kPacks * 16 + 8 * N * kPitch * 4) +
           kGroup * kTile * 4 * static_cast<int>(std::bit_ceil(static_cast<unsigned>(l.rows))) +
           (has_norm ? l.units * kUnit * 8 : 0) + (M > 0 ? 0 : input_bytes());
  };
  while (l.rows > 1 && bytes() > most_shared) --l.rows;
  while (l.warps > 1 && bytes() > most_shared) --l.warps;
  if (bytes() > most_shared) l.rows = 0;
  l.shared = static_cast<std::size_t>(bytes());
  return l;
}

template <int N, int M>
bool launch(SkinnyCall call, cudaStream_t stream) {
  int device = 0, processors = 0, most_shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const bool has_norm = std::any_of(call.layer, call.layer + call.layers,
                                    [](const auto& layer) { return layer.norm != InputNorm::none; });
  const auto l = layout<N, M>(call, has_norm, most_shared - 1024);
  if (l.rows == 0) return false;
  allow_shared_memory(forward<N, M>, l.shared);
  const dim3 grid(grid_size(call.tiles, processors / l.blocks), 1, static_cast<unsigned>(l.blocks));
  Shares shares{.tiles = call.tiles / grid.x,
                .more = call.tiles % grid.x,
                .units = l.units,
                .row_bits = 0,
                .has_norm = has_norm};
  for (int left = call.rows; left > 0; left -= call.rows) {
    call.rows = std::min(left, l.rows);
    shares.row_bits = std::bit_width(static_cast<unsigned>(call.rows - 1));
    launch_step({grid, static_cast<unsigned>(32 * l.warps), l.shared, stream, grid.z}, forward<N, M>, call,
                shares);
    for (int i = 0; i < call.layers; ++i) {
      auto& layer = call.layer[i];
      layer.x += std::int64_t{call.rows} * call.width, layer.y += std::int64_t{call.rows} * layer.out;
      if (layer.add != nullptr) layer.add += std::int64_t{call.rows} * layer.out;
    }
  }
  return true;
}

}  // namespace

bool skinny_linear(SkinnyCall call, cudaStream_t stream) {
  call.tiles = 0;
  for (int i = 0; i < call.layers; ++i) {
    auto& layer = call.layer[i];
    layer.first_tile = call.tiles;
    call.tiles += static_cast<unsigned>(ceil_div(layer.out, layer.up != nullptr ? kTile / 2 : kTile));
  }
  if (call.tiles == 0 || call.rows == 0) return true;
  return (call.rows > 16 && launch<4, 2>(call, stream)) || (call.rows > 8 && launch<2, 4>(call, stream)) ||
         launch<1, 0>(call, stream);
}

}  // namespace megalodon::ops::cuda
