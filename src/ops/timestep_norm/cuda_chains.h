#pragma once
#include <cuda_pipeline.h>

#include <cstdint>

#include "ops/cuda_device.h"
#include "ops/cuda_step.h"
#include "ops/timestep_norm/kernel.h"

// How timestep norm is shared out. A chain is a sequence and as many neighbouring groups as make 128 bytes of
// a row, and belongs to the warps of a cluster of blocks. A tile of it, some steps, belongs to one warp: it
// reads the tile once, sums over the features, and writes the result when it knows the sums of the tiles
// before. Warps take tiles in turns, a tile each in a round, and tell their sums through shared memory with
// one barrier of the cluster a round. Between a warp's arrival at it and its waiting there it writes its tile
// of the round before, and the tiles of the next rounds are on their way.
namespace megalodon::ops::cuda::chains {

using cpu::TimestepNormShape;

// Tiles of a warp in shared memory: to be written, summed up, on its way; and rounds whose sums are kept: one
// is written while the two before are read.
constexpr int kStages = 3;
constexpr int kRowBits = 3;  // log2 of the lanes of a row, 16 bytes each, where a group is no wider

struct alignas(16) Sums {
  double s, q;
};
__device__ inline Sums operator+(Sums a, Sums b) {
  return {a.s + b.s, a.q + b.q};
}

// The lanes of a group: at most those of a row, so that lanes can take rows; at most a warp's; more.
enum class Extent { kRow, kWarp, kMore };

// How a pass is shared out.
struct Plan {
  int K, lane_bits, row_bits;    // log2 of the lanes of a group and of a row of a tile
  int groups, slices;            // groups of a chain, chains of a sequence
  float scale;                   // 1/K
  int steps, tiles;              // steps of a tile, tiles of a chain
  int last_steps;                // of the last of those
  int blocks, warp_bits, units;  // blocks of a cluster, log2 of the warps of a block, warps of a cluster

  // V features a lane.
  Plan(const TimestepNormShape& s, int V, int rows, int blocks, int warp_bits)
      : K(static_cast<int>(s.D / s.G)),
        lane_bits(0),
        scale(1 / static_cast<float>(K)),
        blocks(blocks),
        warp_bits(warp_bits),
        units(blocks << warp_bits) {
    while (V << lane_bits < K && lane_bits < 5) ++lane_bits;
    row_bits = lane_bits > kRowBits ? lane_bits : kRowBits;
    groups = 1 << (row_bits - lane_bits), slices = static_cast<int>(ceil_div(s.G, groups));
    steps = rows << (5 - row_bits), tiles = static_cast<int>(ceil_div(s.L, steps));
    last_steps = static_cast<int>(s.L - std::int64_t{tiles - 1} * steps);
  }
  __device__ int lanes() const { return 1 << lane_bits; }
  __host__ __device__ bool is_narrow() const { return row_bits == kRowBits; }
  __host__ Extent extent(int V) const {
    return K > 32 * V ? Extent::kMore : is_narrow() ? Extent::kRow : Extent::kWarp;
  }
  __device__ int rounds() const { return (tiles + units - 1) / units; }
};
// The plan with what the compiler may know of it.
template <class Shape, Extent kExtent>
__device__ Plan known(Plan plan) {
  plan.warp_bits = Shape::kWarpBits;
  if constexpr (kExtent == Extent::kRow)
    plan.row_bits = kRowBits, plan.steps = Shape::kRows << (5 - kRowBits);
  return plan;
}

// A thread's place in a chain: V columns of some rows of a warp's tiles, and those 32 V further on where a
// group is wider.
template <int V, bool kKept>
struct Place {
  int b, first_group, groups;  // the chain
  int unit;                    // the warp of the cluster
  int row, row_step;           // rows `row`, `row` + `row_step`, ...
  int g, first;                // the group of the chain; the first feature of the group
  std::int64_t start;          // where the thread's rows of the sequence's first tile start

  __device__ Place(const TimestepNormShape& s, const Plan& plan)
      : b(static_cast<int>(blockIdx.x / plan.slices)),
        first_group(static_cast<int>(blockIdx.x % plan.slices) * plan.groups),
        groups(min(static_cast<int>(s.G) - first_group, plan.groups)),
        unit((static_cast<int>(blockIdx.z) << plan.warp_bits) + warp()),
        row(lane() >> plan.row_bits),
        row_step(32 >> plan.row_bits),
        g((lane() & ((1 << plan.row_bits) - 1)) >> plan.lane_bits),
        first(g < groups ? (lane() & (plan.lanes() - 1)) * V : plan.K),  // none
        start((b * s.L + row) * s.D + column(plan)) {}
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ int step(int r) const { return row + r * row_step; }  // of the tile
  __device__ int group() const { return first_group + min(g, groups - 1); }
  __device__ int column(const Plan& plan) const { return group() * plan.K + first; }
  __device__ bool is_first() const { return first == 0; }  // lane of a group
  // f(offset of the columns)
  template <class F>
  __device__ void for_columns(const Plan& plan, F&& f) const {
    for (int offset = 0; first + offset < plan.K; offset += 32 * V) {
      f(offset);
      if constexpr (kKept) break;
    }
  }
};

// A warp's tile of a round, without steps where none is left, in place `stage` of shared memory.
struct Tile {
  int index, first_step, steps, stage;

  __device__ Tile(const Plan& plan, int unit, int round, bool backward) {
    const int turn = round * plan.units + unit;
    index = backward ? plan.tiles - 1 - turn : turn;
    first_step = index * plan.steps;
    steps = turn >= plan.tiles ? 0 : index == plan.tiles - 1 ? plan.last_steps : plan.steps;
    stage = round % kStages;
  }
  __device__ static int stage_before(int stage) { return stage == 0 ? kStages - 1 : stage - 1; }
};

// f.operator()<all>()
template <class F>
__device__ void with_all(bool all, F&& f) {
  all ? f.template operator()<true>() : f.template operator()<false>();
}

// A thread's share of the tiles of x [B, L, D] or its like. They come once, into shared memory; where a group
// is too wide they are read from x each time. What is read of rows that are not there means nothing.
template <class T, int V, int kRows, bool kKept>
struct Features {
  const T* x;
  int D;
  Pack<T, V>* warp;  // its tiles
  int slots[2];      // of the thread's packs in even and odd rows of a tile

  __device__ Features(const T* x, const TimestepNormShape& s, const Plan& plan, const Place<V, kKept>& at,
                      Pack<T, V>* shared)
      : x(x), D(static_cast<int>(s.D)), warp(shared) {
    for (int i = 0; i < 2; ++i)
      slots[i] = plan.is_narrow() ? swizzled(at.step(i), at.lane() % 8) - i * 32 : at.lane();
  }
  // Where the thread's rows of a tile start, and its next row.
  __device__ std::int64_t start_of(const Place<V, kKept>& at, const Tile& tile) const {
    return at.start + std::int64_t{tile.first_step} * D;
  }
  __device__ std::int64_t pitch(const Place<V, kKept>& at) const { return std::int64_t{at.row_step} * D; }
  // Where pack i of row t lies in a tile with 8 lanes a row: in all banks both the packs of a row and one
  // pack each of 8 rows.
  __device__ static int swizzled(int t, int i) { return t * 8 + (i ^ t % 8); }
  __device__ int slot(int r) const { return r * 32 + slots[r % 2]; }

  // Of row t of such a tile, whose packs other lanes brought, and a group that starts at pack `first` of it:
  // the group's pack k lies at this ^ k.
  __device__ static int group_slot(int place, int t, int first) { return place + swizzled(t, first); }
  // To be committed and waited for.
  __device__ void start(const Plan& plan, const Place<V, kKept>& at, const Tile& tile, int place) const {
    if (!kKept || at.first >= plan.K) return;
    with_all(tile.steps == plan.steps, [&]<bool kAll>() {
      const T* from = x + start_of(at, tile);
#pragma unroll
      for (int r = 0; r < kRows; ++r, from += pitch(at)) {
        if (!kAll && at.step(r) >= tile.steps) break;
        Pack<T, V>* const to = warp + place + slot(r);
        if constexpr (sizeof(*to) >= 4) {
          __pipeline_memcpy_async(to, from, sizeof(*to));
        } else {
          *to = load_pack<V>(from);
        }
      }
    });
  }
  __device__ Pack<T, V> read(const Place<V, kKept>& at, const Tile& tile, int place, int r,
                             int column) const {
    if constexpr (kKept) return warp[place + slot(r)];
    const T* from = x + start_of(at, tile) + r * pitch(at) + column;
    return at.step(r) < tile.steps ? load_pack<V>(from) : Pack<T, V>{};
  }
};

// Counted steps of sequence b among `begin` .. `end` - 1, for a warp.
__device__ inline std::int64_t counted(const std::uint8_t* mask, const TimestepNormShape& s, std::int64_t b,
                                       int begin, int end) {
  if (mask == nullptr) return end - begin;
  unsigned mine = 0;
#pragma unroll 4
  for (int t = begin + static_cast<int>(threadIdx.x) % 32; t < end; t += 32) mine += mask[b * s.L + t] == 0;
  return __reduce_add_sync(~0u, mine);
}

// Which steps of a tile count: those that are there and not padded.
struct Counts {
  unsigned bits;
  std::int64_t before;  // counted steps before the tile, earlier calls' too

  Counts() = default;
  __device__ Counts(const std::uint8_t* mask, const TimestepNormShape& s, int b, const Tile& tile,
                    std::int64_t before)
      : bits(tile.steps == 0 ? 0 : ~0u >> (32 - tile.steps)), before(before) {
    if (mask == nullptr || tile.steps == 0) return;
    const int t = min(static_cast<int>(threadIdx.x % 32), tile.steps - 1);
    bits &= __ballot_sync(~0u, mask[b * s.L + tile.first_step + t] == 0);
  }
  __device__ bool are_all(int steps) const { return bits == ~0u >> (32 - steps); }
  __device__ bool has(int t) const { return (bits >> t & 1) != 0; }
  __device__ std::int64_t until(int t) const {  // with t
    return before + __popc(bits & (~0u >> (31 - t)));
  }
};

// Zeros in y or dx where steps are padded.
template <class T, int V, bool kKept>
__device__ void clear_padding(const TimestepNormShape& s, const Plan& plan, const Place<V, kKept>& at,
                              const Tile& tile, const Counts& counts, T* of) {
  at.for_columns(plan, [&](int offset) {
    for (int t = at.row; t < tile.steps; t += at.row_step) {
      if (!counts.has(t))
        store<V>({}, of + (at.b * s.L + tile.first_step + t) * s.D + at.column(plan) + offset);
    }
  });
}

// x/n for a count n > 0, exact where x is a multiple of n. Unlike a division and a root it calls nothing, and
// so does the next: around a call registers are saved.
struct Divisor {
  double n, reciprocal;

  __device__ explicit Divisor(std::int64_t count) : n(static_cast<double>(count)) {
    reciprocal = __fdividef(1, static_cast<float>(count));
#pragma unroll
    for (int i = 0; i < 2; ++i) reciprocal = fma(fma(-n, reciprocal, 1.0), reciprocal, reciprocal);
  }
  __device__ double operator()(double x) const {
    const double quotient = x * reciprocal;
    return fma(fma(-n, quotient, x), reciprocal, quotient);
  }
};

__device__ inline float reciprocal_root(float x) {
  const float r = rsqrtf(x);
  return fmaf(0.5f * r, fmaf(-x * r, r, 1), r);
}

// Each becomes its sum over `lanes` neighbouring lanes.
template <int N>
__device__ void group_sums(float (&x)[N], unsigned lanes) {
  for (unsigned offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += __shfl_xor_sync(~0u, x[i], offset);
  }
}

// Over each `lanes` neighbouring lanes: the prefix sums of `own`, each with itself, and the sum of `others`.
__device__ inline void scan(Sums& own, Sums& others, int lanes) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    if (offset >= lanes) break;
    const double there = threadIdx.x % lanes >= offset ? 1 : 0;  // fewer instructions than a choice
    own = Sums{fma(__shfl_up_sync(~0u, own.s, offset, lanes), there, own.s),
               fma(__shfl_up_sync(~0u, own.q, offset, lanes), there, own.q)};
    others = others + Sums{__shfl_xor_sync(~0u, others.s, offset), __shfl_xor_sync(~0u, others.q, offset)};
  }
}

// Of a warp and a group, in shared memory: what comes before the warp's tile.
struct alignas(16) Before {
  Sums sums;
  float center;

  // `others` more than before the tile before; a lane of each group keeps it.
  __device__ Sums more(Sums others, bool keeps) {
    const Sums sum = sums + others;
    __syncwarp();
    if (keeps) sums = sum;
    return sum;
  }
};

// What the warps of a cluster tell each other of a chain, in shared memory: the sums of their tiles.
struct Chain {
  Sums* told;  // [kStages, warps of the block, groups]
  int groups, warp_bits, units, unit;

  static std::size_t bytes(const Plan& plan) {
    return static_cast<std::size_t>((kStages << plan.warp_bits) * plan.groups) * sizeof(Sums);
  }
  __device__ Chain(const Plan& plan, int unit, void* shared)
      : told(static_cast<Sums*>(shared)),
        groups(plan.groups),
        warp_bits(plan.warp_bits),
        units(plan.units),
        unit(unit) {}
  __device__ Sums& told_by(int u, int stage, int g) const {
    return told[((stage << warp_bits) + (u & ((1 << warp_bits) - 1))) * groups + g];
  }
  // Nothing, before the first round.
  __device__ void start(int g) const { told_by(unit, kStages - 1, g) = {0, 0}; }
  // By one lane, before the barrier of the round.
  __device__ void tell(int stage, int g, Sums sums) const { told_by(unit, stage, g) = sums; }
  // The share of lane i of `lanes` in the sum of what was told since the warp's last tile, after that
  // barrier.
  __device__ Sums others(int stage, int g, int i, int lanes) const {
    const auto of = [&](int u) {
      const Sums* const mine = &told_by(u, u < unit ? stage : Tile::stage_before(stage), g);
      const double2 sums = read_of_block(reinterpret_cast<const double2*>(mine), u >> warp_bits);
      return Sums{sums.x, sums.y};
    };
    Sums sum{0, 0};
    if (i < units) sum = of(i);  // mostly all
#pragma unroll 1
    for (int u = i + lanes; u < units; u += lanes) sum = sum + of(u);
    return sum;
  }
};

// The first tiles of a warp are on their way: before what else a kernel needs is read.
template <class Start>
__device__ void start_tiles(const Plan& plan, int unit, bool backward, Start&& start) {
  for (int round = 0; round < kStages - 1; ++round) {
    start(Tile(plan, unit, round, backward));
    __pipeline_commit();
  }
}
// Until the next tile is there, for all lanes.
__device__ inline void wait_for_tile() {
  __pipeline_wait_prior(kStages - 2);
  __syncwarp();
}
// Then, in each round: advance(before, tile) has waited for the tile, summed it up and told it, and knows
// what comes before the tile of the round before; write(that one); start(tile) of the round after the next.
template <class Advance, class Write, class Start>
__device__ void go_through_tiles(const Plan& plan, int unit, bool backward, Advance&& advance, Write&& write,
                                 Start&& start) {
  Tile before(plan, unit, kStages - 1, backward), now(plan, unit, 0, backward), next(plan, unit, 1, backward);
  before.steps = 0;
  for (int round = 0; round <= plan.rounds(); ++round) {  // no tiles in the last
    advance(before, now);
    cluster_arrive();
    if (before.steps > 0) write(before);
    const Tile coming(plan, unit, round + kStages - 1, backward);
    start(coming);
    __pipeline_commit();
    before = now, now = next, next = coming;
    cluster_wait();
  }
  cluster_sync();  // no block ends while another reads its memory
}

}  // namespace megalodon::ops::cuda::chains
