#include "ops/timestep_norm/cuda.h"

#include <cuda_pipeline.h>

#include <algorithm>
#include <array>

#include "ops/cuda_device.h"
#include "ops/cuda_step.h"

// Shapes: B batch, L steps, D features, G groups, K = D/G features of a group.
//
// With S and Q the sums of u/K and u^2/K, u = x - center, over the features of a group and all n counted
// steps so far, mean = center + S/n and var = Q/n - (S/n)^2. So both passes are prefix sums of two numbers in
// float64: forward of S and Q over the steps, backward of their gradients, from the last step on. The center
// is the mean before the first step, 0 where nothing was counted: with much counted, means hardly differ from
// it.
//
// One kernel each way. A chain is a sequence and as many neighbouring groups as make 128 bytes of a row, and
// belongs to the warps of a cluster of blocks. A tile of it, some steps, belongs to one warp: it reads the
// tile once, sums over the features, and writes the result when it knows the sums of the tiles before. Warps
// take tiles in turns, a tile each in a round, and tell their sums through shared memory with one barrier of
// the cluster a round. Between a warp's arrival at it and its waiting there it writes its tile of the round
// before, and the tiles of the next rounds are on their way.
namespace megalodon::ops::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kBlocks = 2;                          // of a multiprocessor
constexpr int kForwardRows = 8, kBackwardRows = 4;  // of a thread in a tile
constexpr int kStages = 3;      // tiles of a warp in shared memory: to be written, summed up, on its way
constexpr int kToldRounds = 4;  // whose sums are kept: one is written while the two before are read
constexpr int kRowBits = 3;     // log2 of the lanes of a row, 16 bytes each, where a group is no wider

struct alignas(16) Sums {
  double s, q;
};
__device__ Sums operator+(Sums a, Sums b) {
  return {a.s + b.s, a.q + b.q};
}

// How a pass is shared out.
struct Plan {
  int K, lane_bits, row_bits;  // log2 of the lanes of a group and of a row of a tile
  int groups, slices;          // groups of a chain, chains of a sequence
  float scale;                 // 1/K
  int steps, tiles;            // steps of a tile, tiles of a chain
  int last_steps;              // of the last of those
  int blocks, units;           // blocks and warps of a cluster

  // V features a lane.
  Plan(const TimestepNormShape& s, int V, int rows)
      : K(static_cast<int>(s.D / s.G)),
        lane_bits(0),
        scale(1 / static_cast<float>(K)),
        units(static_cast<int>(timestep_norm_units(s))) {
    while (V << lane_bits < K && lane_bits < 5) ++lane_bits;
    row_bits = lane_bits > kRowBits ? lane_bits : kRowBits;
    groups = 1 << (row_bits - lane_bits), slices = static_cast<int>(ceil_div(s.G, groups));
    steps = rows << (5 - row_bits), tiles = static_cast<int>(ceil_div(s.L, steps));
    last_steps = static_cast<int>(s.L - std::int64_t{tiles - 1} * steps);
    blocks = units / kWarps;
  }
  __device__ int lanes() const { return 1 << lane_bits; }
  __device__ int rounds() const { return (tiles + units - 1) / units; }
};

// A thread's place in a chain: V columns of some rows of a warp's tiles, and those 32 V further on where a
// group is wider.
template <int V, bool kKept>
struct Place {
  int b, first_group, groups;  // the chain
  int unit;                    // the warp of the cluster
  int row, row_step;           // rows `row`, `row` + `row_step`, ...
  int g, first;                // the group of the chain; the first feature of the group

  __device__ Place(const TimestepNormShape& s, const Plan& plan)
      : b(static_cast<int>(blockIdx.x / plan.slices)),
        first_group(static_cast<int>(blockIdx.x % plan.slices) * plan.groups),
        groups(min(static_cast<int>(s.G) - first_group, plan.groups)),
        unit(static_cast<int>(blockIdx.z) * kWarps + warp()),
        row(lane() >> plan.row_bits),
        row_step(32 >> plan.row_bits),
        g((lane() & ((1 << plan.row_bits) - 1)) >> plan.lane_bits),
        first(g < groups ? (lane() & (plan.lanes() - 1)) * V : plan.K) {}  // none
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

// A warp's tile of a round, without steps where none is left.
struct Tile {
  int index, steps;
  std::int64_t first_step;

  __device__ Tile(const Plan& plan, int unit, int round, bool backward) {
    const int turn = round * plan.units + unit;
    index = backward ? plan.tiles - 1 - turn : turn;
    first_step = std::int64_t{index} * plan.steps;
    steps = turn >= plan.tiles ? 0 : index == plan.tiles - 1 ? plan.last_steps : plan.steps;
  }
};

// A thread's share of the tiles of x [B, L, D] or its like. They come once, into shared memory, where only
// the thread itself reads them; where a group is too wide they are read from x each time. What is read of
// rows that are not there means nothing.
template <class T, int V, int kRows, bool kKept>
struct Features {
  const T* first;  // of the first row of the sequence's first tile
  std::int64_t D;
  Pack<T, V>* kept;

  // `shared`: of the warp; tile i of the warp lies `pitch` (i % kStages) packs after it.
  __device__ Features(const T* x, const TimestepNormShape& s, const Plan& plan, const Place<V, kKept>& at,
                      Pack<T, V>* shared)
      : first(x + (at.b * s.L + at.row) * s.D + at.column(plan)), D(s.D), kept(shared + at.lane()) {}

  // To be committed and waited for.
  __device__ void start(const Plan& plan, const Place<V, kKept>& at, const Tile& tile, int place) const {
    if (!kKept || at.first >= plan.K) return;
    const T* from = first + tile.first_step * D;
    const std::int64_t pitch = at.row_step * D;
#pragma unroll
    for (int r = 0; r < kRows; ++r, from += pitch) {
      if (at.step(r) >= tile.steps) break;
      Pack<T, V>* const to = kept + place + r * 32;
      if constexpr (sizeof(*to) >= 4) {
        __pipeline_memcpy_async(to, from, sizeof(*to));
      } else {
        *to = load_pack<V>(from);
      }
    }
  }
  __device__ Pack<T, V> read(const Place<V, kKept>& at, const Tile& tile, int place, int r,
                             int offset) const {
    if constexpr (kKept) return kept[place + r * 32];
    const T* from = first + (tile.first_step + r * at.row_step) * D + offset;
    return at.step(r) < tile.steps ? load_pack<V>(from) : Pack<T, V>{};
  }
};

// Counted steps of sequence b among `begin` .. `end` - 1, for a warp.
__device__ std::int64_t counted(const std::uint8_t* mask, const TimestepNormShape& s, std::int64_t b,
                                std::int64_t begin, std::int64_t end) {
  if (mask == nullptr) return end - begin;
  unsigned mine = 0;
#pragma unroll 4
  for (std::int64_t t = begin + threadIdx.x % 32; t < end; t += 32) mine += mask[b * s.L + t] == 0;
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

// What is known of each step and group of a tile, in shared memory. Steps are 32 at most: a lane each.
template <class Step>
struct StepArray {
  Step* data;
  int pitch;
  __device__ StepArray(Step* data, const Plan& plan) : data(data), pitch(plan.steps + 1) {}
  __device__ Step& operator()(int t, int g) const { return data[g * pitch + t]; }
};
__host__ __device__ int count_steps(const Plan& plan) {
  return (plan.steps + 1) * plan.groups;
}
// y = ((x - mean) rstd + rest) (1 + weight) + bias: mean is center + distance rounded, rest the rounding.
union ForwardStep {
  struct {
    float distance, variance;
  } alone;    // of the step's features
  Sums sums;  // of the tile's steps until it, with it
  struct {
    float mean, rstd, rest;
  } all;  // of all steps until it
};
// dx = h rstd + slope (x - mean) + constant, h = dy (1 + weight).
struct alignas(16) BackwardStep {
  float distance, rstd, slope, constant;  // the last two: the sums of h (x - mean) and h until then
};

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

__device__ float reciprocal_root(float x) {
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

// Each lane's number becomes its sum with that of the lane `offset` before, where there is one.
__device__ void add_from_before(double& x, int offset) {
  asm("{\n.reg .pred there;\n.reg .b32 low, high;\n.reg .f64 before;\nmov.b64 {low, high}, %0;\n"
      "shfl.sync.up.b32 low|there, low, %1, 0, -1;\nshfl.sync.up.b32 high|there, high, %1, 0, -1;\n"
      "mov.b64 before, {low, high};\n@there add.f64 %0, %0, before;\n}"
      : "+d"(x)
      : "r"(offset));
}
// Prefix sums of a warp's numbers, each with itself.
__device__ Sums scan(Sums sum) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    add_from_before(sum.s, offset);
    add_from_before(sum.q, offset);
  }
  return sum;
}

// What the warps of a cluster tell each other of a chain, in shared memory: the sums of their tiles.
struct Chain {
  Sums *told, *before;  // [kToldRounds, kWarps, groups], [kWarps, groups]
  int groups, units, unit;

  static std::size_t bytes(const Plan& plan) {
    return sizeof(Sums) * (kToldRounds + 1) * kWarps * static_cast<std::size_t>(plan.groups);
  }
  __device__ Chain(const Plan& plan, int unit, void* shared)
      : told(static_cast<Sums*>(shared)),
        before(told + kToldRounds * kWarps * plan.groups),
        groups(plan.groups),
        units(plan.units),
        unit(unit) {}
  __device__ Sums& told_by(int u, int round, int g) const {
    return told[(round % kToldRounds * kWarps + u % kWarps) * groups + g];
  }
  __device__ Sums& before_own(int g) const { return before[unit % kWarps * groups + g]; }

  // What is before the first tile, by one lane.
  __device__ void start(int g, Sums sums) const { before_own(g) = sums; }
  // By the last lane of a warp, before the barrier of the round.
  __device__ void tell(int round, int g, Sums sums) const {
    if (threadIdx.x % 32 == 31) told_by(unit, round, g) = sums;
  }
  // The sum of all before the warp's tile of the round, after that barrier; once for each round, in turn.
  __device__ Sums until(int round, int g) const {
    Sums sum{0, 0};
#pragma unroll 1
    for (int u = static_cast<int>(threadIdx.x) % 32; u < units; u += 32) {
      const int of_round = u < unit ? round : round - 1;
      if (of_round >= 0) {
        const Sums* const mine = &told_by(u, of_round, g);
        const double2 told = read_of_block(reinterpret_cast<const double2*>(mine), u / kWarps);
        sum = sum + Sums{told.x, told.y};
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      sum = sum + Sums{__shfl_xor_sync(~0u, sum.s, offset), __shfl_xor_sync(~0u, sum.q, offset)};
    sum = before_own(g) + sum;
    __syncwarp();
    if (threadIdx.x % 32 == 0) before_own(g) = sum;
    return sum;
  }
};

// sum_up(round) and tell it, finish(round) what is before it known, start(round) it on its way.
template <class SumUp, class Finish, class Start>
__device__ void go_through_tiles(const Plan& plan, SumUp&& sum_up, Finish&& finish, Start&& start) {
  const int rounds = plan.rounds();
  for (int i = 0; i < kStages - 1; ++i) {
    start(i);
    __pipeline_commit();
  }
  for (int round = 0; round <= rounds; ++round) {
    __pipeline_wait_prior(kStages - 2);
    sum_up(round);  // nothing in the last round
    cluster_arrive();
    if (round > 0) finish(round - 1);
    start(round + kStages - 1);
    __pipeline_commit();
    cluster_wait();
  }
  cluster_sync();  // no block ends while another reads its memory
}

template <class T, int V, bool kKept>
constexpr int kForwardPacks = kKept ? kForwardRows * 32 : 0;  // of a tile

template <class T, int V, bool kKept>
std::size_t forward_bytes(const Plan& plan) {
  return kWarps * (kStages * kForwardPacks<T, V, kKept> * sizeof(Pack<T, V>) +
                   2 * sizeof(ForwardStep) * count_steps(plan)) +
         Chain::bytes(plan);
}

template <class T, int V, bool kKept>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward(TimestepNormShape s, TimestepNormForward<T> a, std::int64_t* last_count, Plan plan) {
  extern __shared__ uint4 shared[];
  constexpr int kPacks = kForwardPacks<T, V, kKept>;
  const Place<V, kKept> at(s, plan);
  auto* const packs = reinterpret_cast<Pack<T, V>*>(shared);
  auto* const steps = reinterpret_cast<ForwardStep*>(packs + kWarps * kStages * kPacks);
  const int steps_of_tile = count_steps(plan);
  const Chain chain(plan, at.unit, steps + kWarps * 2 * steps_of_tile);
  const Features<T, V, kForwardRows, kKept> x(a.x, s, plan, at, packs + at.warp() * kStages * kPacks);
  const auto tile_of = [&](int round) { return Tile(plan, at.unit, round, false); };
  const auto place_of = [&](int round) { return round % kStages * kPacks; };
  const auto steps_of = [&](int round) {
    return StepArray(steps + (at.warp() * 2 + round % 2) * steps_of_tile, plan);
  };

  wait_for_previous();
  const std::int64_t prior = a.count[at.b];
  const float center = prior > 0 ? a.mean[at.b * s.G + at.group()] : 0;
  for (int g = at.lane(); g < at.groups; g += 32)
    chain.start(g, {0, prior > 0 ? static_cast<double>(prior) * a.var[at.b * s.G + at.first_group + g] : 0});
  float weight[V] = {}, bias[V] = {};
  const auto load_parameters = [&](int offset) {
    load(a.weight + at.column(plan) + offset, weight);
    load(a.bias + at.column(plan) + offset, bias);
#pragma unroll
    for (int j = 0; j < V; ++j) weight[j] += 1;
  };
  if (kKept && at.first < plan.K) load_parameters(0);

  std::int64_t counted_steps = prior, counted_until = 0;
  Counts coming, now;  // of the tile that was summed up last, and the one before
  // The sums over the tile's features, and over its steps.
  const auto sum_up = [&](int round) {
    const Tile tile = tile_of(round);
    const StepArray<ForwardStep> step = steps_of(round);
    if (tile.steps > 0) {
      counted_steps += counted(a.mask, s, at.b, counted_until, tile.first_step);
      counted_until = tile.first_step;
      Pack<T, V> packs[kForwardRows];
      float mean[kForwardRows] = {}, squares[kForwardRows] = {};
      at.for_columns(plan, [&](int offset) {
#pragma unroll
        for (int r = 0; r < kForwardRows; ++r) {
          packs[r] = x.read(at, tile, place_of(round), r, offset);
          float v[V];
          unpack(packs[r], v);
#pragma unroll
          for (int j = 0; j < V; ++j) mean[r] += v[j];
        }
      });
      group_sums(mean, plan.lanes());
#pragma unroll
      for (int r = 0; r < kForwardRows; ++r) mean[r] *= plan.scale;
      at.for_columns(plan, [&](int offset) {
#pragma unroll
        for (int r = 0; r < kForwardRows; ++r) {
          if constexpr (!kKept) packs[r] = x.read(at, tile, place_of(round), r, offset);
          float v[V];
          unpack(packs[r], v);
#pragma unroll
          for (int j = 0; j < V; ++j) squares[r] += (v[j] - mean[r]) * (v[j] - mean[r]);
        }
      });
      group_sums(squares, plan.lanes());
      if (at.is_first()) {
#pragma unroll
        for (int r = 0; r < kForwardRows; ++r)
          step(at.step(r), at.g).alone = {mean[r] - center, squares[r] * plan.scale};
      }
      __syncwarp();
    }
    now = coming;
    coming = Counts(a.mask, s, at.b, tile, counted_steps);
    for (int g = 0; g < at.groups; ++g) {
      Sums sums{0, 0};
      if (coming.has(at.lane())) {
        const auto alone = step(at.lane(), g).alone;
        const double distance = alone.distance;
        sums = {distance, alone.variance + distance * distance};
      }
      sums = scan(sums);
      chain.tell(round, g, sums);
      if (at.lane() < plan.steps) step(at.lane(), g).sums = sums;
    }
  };
  // The statistics with each step, and y.
  const auto finish = [&](int round) {
    const Tile tile = tile_of(round);
    if (tile.steps == 0) return;
    const StepArray<ForwardStep> step = steps_of(round);
    const int t = at.lane();
    for (int g = 0; g < at.groups; ++g) {
      const std::int64_t group = at.first_group + g, of_state = at.b * s.G + group;
      const Sums before = chain.until(round, g);
      if (t >= plan.steps) continue;
      const Sums sums = before + step(t, g).sums;
      const float mean_0 = a.mean[of_state], from = prior > 0 ? mean_0 : 0;
      const std::int64_t n = now.until(t);
      const Divisor by_n(n);
      const double distance = n > prior ? by_n(sums.s) : mean_0 - from,
                   var = n > prior ? fmax(0.0, by_n(sums.q) - distance * distance) : a.var[of_state];
      const float mean = static_cast<float>(from + distance),
                  rstd = reciprocal_root(static_cast<float>(var) + a.eps);
      step(t, g).all = {mean, rstd, static_cast<float>(mean - (from + distance)) * rstd};
      if (a.step_mean != nullptr && t < tile.steps) {
        a.step_mean[of_state * (s.L + 1) + 1 + tile.first_step + t] = static_cast<float>(distance);
        a.step_rstd[of_state * s.L + tile.first_step + t] = rstd;
        if (tile.first_step + t == 0) a.step_mean[of_state * (s.L + 1)] = from;
      }
      if (tile.index == plan.tiles - 1 && t == plan.steps - 1) {
        a.last_mean[of_state] = mean, a.last_var[of_state] = static_cast<float>(var);
        if (group == 0) last_count[at.b] = n;
      }
    }
    __syncwarp();
    at.for_columns(plan, [&](int offset) {
      if constexpr (!kKept) load_parameters(offset);
      T* to = a.y + (x.first - a.x) + tile.first_step * s.D + offset;
#pragma unroll
      for (int r = 0; r < kForwardRows; ++r, to += at.row_step * s.D) {
        const auto with_step = step(at.step(r), at.g).all;
        float y[V];
        unpack(x.read(at, tile, place_of(round), r, offset), y);
#pragma unroll
        for (int j = 0; j < V; ++j)
          y[j] = fmaf(fmaf(y[j] - with_step.mean, with_step.rstd, with_step.rest), weight[j], bias[j]);
        if (now.has(at.step(r))) store(y, to);
      }
    });
    if (a.mask != nullptr) clear_padding(s, plan, at, tile, now, a.y);
    __syncwarp();  // the steps have been read
  };
  go_through_tiles(plan, sum_up, finish,
                   [&](int round) { x.start(plan, at, tile_of(round), place_of(round)); });
}

// What is added to a tile of dx, into the second cache.
template <class T, int V, int kRows, bool kKept>
__device__ void fetch_added(const T* added, std::int64_t first, const TimestepNormShape& s, const Plan& plan,
                            const Place<V, kKept>& at, const Tile& tile) {
  if (added == nullptr) return;
  at.for_columns(plan, [&](int offset) {
    const T* from = added + first + offset;
    for (int r = 0; r < kRows; ++r, from += at.row_step * s.D) {
      if (at.step(r) < tile.steps) prefetch(from);
    }
  });
}
template <class T, int V>
__device__ void add_to(float (&v)[V], const T* added, std::int64_t at) {
  if (added == nullptr) return;
  float more[V];
  unpack(load_pack<V>(added + at), more);
#pragma unroll
  for (int j = 0; j < V; ++j) v[j] += more[j];
}

template <class T, int V, bool kKept>
constexpr int kBackwardPacks = kKept ? kBackwardRows * 32 : 0;  // of a tile, of x or dy

template <class T, int V, bool kKept>
std::size_t backward_bytes(const Plan& plan) {
  return kWarps * (kStages * 2 * kBackwardPacks<T, V, kKept> * sizeof(Pack<T, V>) +
                   (kStages * sizeof(BackwardStep) + 2 * sizeof(Sums)) * count_steps(plan)) +
         Chain::bytes(plan);
}

// With u = x - mean and h = dy (1 + weight), the gradients of a step's statistics are
//   d_mean = -rstd sum(h),   d_var = -rstd^3 sum(h u) / 2,
// and S and Q get (d_mean - 2 (mean - center) d_var)/n and d_var/n from it and from every step after, so that
//   dx = h rstd + (dS + 2 (x - center) dQ) / K.
// These two of a step whose slope and constant are its sums of h u and h, n with it.
__device__ Sums gradient_sums(const BackwardStep& now, std::int64_t n) {
  const double distance = now.distance;
  const float d_mean = -now.rstd * now.constant, d_var = -0.5f * now.rstd * now.rstd * now.rstd * now.slope;
  const Divisor by_n(n);
  return {by_n(d_mean - 2 * distance * d_var), by_n(d_var)};
}

template <class T, int V, bool kKept>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward(TimestepNormShape s, TimestepNormBackward<T> a, TimestepNormAdded<T> added, Plan plan,
             float* parameter_sums) {
  extern __shared__ uint4 shared[];
  constexpr int kPacks = kBackwardPacks<T, V, kKept>;
  const Place<V, kKept> at(s, plan);
  auto* const packs = reinterpret_cast<Pack<T, V>*>(shared);
  auto* const steps = reinterpret_cast<BackwardStep*>(packs + kWarps * kStages * 2 * kPacks);
  const int steps_of_tile = count_steps(plan);
  auto* const step_sums = reinterpret_cast<Sums*>(steps + kWarps * kStages * steps_of_tile);
  const Chain chain(plan, at.unit, step_sums + kWarps * 2 * steps_of_tile);
  auto* const own = packs + at.warp() * kStages * 2 * kPacks;
  const Features<T, V, kBackwardRows, kKept> x(a.x, s, plan, at, own), dy(a.dy, s, plan, at, own + kPacks);
  const auto tile_of = [&](int round) { return Tile(plan, at.unit, round, true); };
  const auto place_of = [&](int round) { return round % kStages * 2 * kPacks; };
  const auto steps_of = [&](int round) {
    return StepArray(steps + (at.warp() * kStages + round % kStages) * steps_of_tile, plan);
  };
  const auto sums_of = [&](int round) {
    return StepArray(step_sums + (at.warp() * 2 + round % 2) * steps_of_tile, plan);
  };
  const int t = plan.steps - 1 - at.lane();  // the lane's step of a tile, the last first

  wait_for_previous();
  const std::int64_t last_count = a.last_count[at.b];
  const float center = a.step_mean[(at.b * s.G + at.group()) * (s.L + 1)];
  for (int g = at.lane(); g < at.groups; g += 32) {
    const std::int64_t of_state = at.b * s.G + at.first_group + g;
    const double d_mean = a.d_last_mean[of_state], d_var = a.d_last_var[of_state],
                 last_mean = a.step_mean[(of_state + 1) * (s.L + 1) - 1];
    const Divisor by_n(last_count);
    chain.start(g, last_count > 0 ? Sums{by_n(d_mean - 2 * last_mean * d_var), by_n(d_var)} : Sums{0, 0});
  }
  float weight[V] = {}, of_columns[2][V] = {};  // the latter: gradients of weight and bias
  const auto load_weight = [&](int offset) {
    load(a.weight + at.column(plan) + offset, weight);
#pragma unroll
    for (int j = 0; j < V; ++j) weight[j] += 1;
  };
  if (kKept && at.first < plan.K) load_weight(0);
  float* const to_sums =
      parameter_sums + (std::int64_t{at.b} * plan.units + at.unit) * 2 * s.D + at.column(plan);
  if constexpr (!kKept) {
    at.for_columns(plan,
                   [&](int offset) { store<V>({}, to_sums + offset), store<V>({}, to_sums + s.D + offset); });
  }

  const auto start = [&](int round) {
    const Tile tile = tile_of(round);
    if (tile.steps == 0) return;
    x.start(plan, at, tile, place_of(round));
    dy.start(plan, at, tile, place_of(round));
    const std::int64_t first = x.first - a.x + tile.first_step * s.D;
    fetch_added<T, V, kBackwardRows>(added.first, first, s, plan, at, tile);
    fetch_added<T, V, kBackwardRows>(added.second, first, s, plan, at, tile);
    if (at.lane() >= tile.steps) return;
    const StepArray<BackwardStep> step = steps_of(round);
    for (int g = 0; g < at.groups; ++g) {
      const std::int64_t of_state = at.b * s.G + at.first_group + g, from = tile.first_step + at.lane();
      BackwardStep& to = step(at.lane(), g);
      __pipeline_memcpy_async(&to.distance, a.step_mean + of_state * (s.L + 1) + 1 + from, 4);
      __pipeline_memcpy_async(&to.rstd, a.step_rstd + of_state * s.L + from, 4);
    }
  };

  std::int64_t counted_steps = last_count, counted_from = s.L;
  Counts coming, now;  // of the tile that was summed up last, and the one before
  // The sums over the tile's features, the gradients of mean and variance of each step, and their sums.
  const auto sum_up = [&](int round) {
    const Tile tile = tile_of(round);
    const StepArray<BackwardStep> step = steps_of(round);
    __syncwarp();  // the steps came for other lanes
    if (tile.steps > 0) {
      counted_steps -= counted(a.mask, s, at.b, tile.first_step, counted_from);
      counted_from = tile.first_step;
      float sum_h[kBackwardRows] = {}, sum_hu[kBackwardRows] = {};
      at.for_columns(plan, [&](int offset) {
        if constexpr (!kKept) load_weight(offset);
#pragma unroll
        for (int r = 0; r < kBackwardRows; ++r) {
          const float mean = center + step(at.step(r), at.g).distance;
          float v[V], d[V];
          unpack(x.read(at, tile, place_of(round), r, offset), v);
          unpack(dy.read(at, tile, place_of(round), r, offset), d);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const float h = d[j] * weight[j];
            sum_h[r] += h, sum_hu[r] += h * (v[j] - mean);
          }
        }
      });
      group_sums(sum_h, plan.lanes());
      group_sums(sum_hu, plan.lanes());
      if (at.is_first()) {
#pragma unroll
        for (int r = 0; r < kBackwardRows; ++r) {
          BackwardStep& to = step(at.step(r), at.g);
          to.slope = sum_hu[r], to.constant = sum_h[r];
        }
      }
      __syncwarp();
    }
    now = coming;
    coming = Counts(a.mask, s, at.b, tile, counted_steps);
    for (int g = 0; g < at.groups; ++g) {
      const bool counts = t >= 0 && coming.has(t);
      const Sums sums = scan(counts ? gradient_sums(step(t, g), coming.until(t)) : Sums{0, 0});
      chain.tell(round, g, sums);
      if (t >= 0) sums_of(round)(t, g) = sums;
    }
  };
  // What comes from the tiles after it, dx, and the gradients of weight and bias.
  const auto finish = [&](int round) {
    const Tile tile = tile_of(round);
    if (tile.steps == 0) return;
    const StepArray<BackwardStep> step = steps_of(round);
    for (int g = 0; g < at.groups; ++g) {
      const std::int64_t of_state = at.b * s.G + at.first_group + g;
      const Sums after = chain.until(round, g);
      if (t < 0) continue;
      const Sums sums = after + sums_of(round)(t, g);
      if (now.has(t)) {
        BackwardStep& to = step(t, g);
        to.slope = static_cast<float>(2 * sums.q) * plan.scale;
        to.constant = static_cast<float>(sums.s + 2 * static_cast<double>(to.distance) * sums.q) * plan.scale;
      }
      if (tile.first_step + t > 0) continue;
      const auto of_prior = [&](double sum, float d_last) {
        return last_count > 0 ? static_cast<float>(static_cast<double>(now.before) * sum) : d_last;
      };
      a.d_mean[of_state] = of_prior(sums.s, a.d_last_mean[of_state]);
      a.d_var[of_state] = of_prior(sums.q, a.d_last_var[of_state]);
    }
    __syncwarp();
    at.for_columns(plan, [&](int offset) {
      if constexpr (!kKept) {
        load_weight(offset);
        load(to_sums + offset, of_columns[0]);
        load(to_sums + s.D + offset, of_columns[1]);
      }
      T* to = a.dx + (x.first - a.x) + tile.first_step * s.D + offset;
#pragma unroll
      for (int r = 0; r < kBackwardRows; ++r, to += at.row_step * s.D) {
        const BackwardStep with_step = step(at.step(r), at.g);
        const float mean = center + with_step.distance;
        if (!now.has(at.step(r))) continue;
        float v[V], d[V];
        unpack(x.read(at, tile, place_of(round), r, offset), v);
        unpack(dy.read(at, tile, place_of(round), r, offset), d);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float u = v[j] - mean, scaled = d[j] * with_step.rstd;
          of_columns[0][j] = fmaf(scaled, u, of_columns[0][j]), of_columns[1][j] += d[j];
          v[j] = fmaf(scaled, weight[j], fmaf(with_step.slope, u, with_step.constant));
        }
        add_to(v, added.first, to - a.dx);
        add_to(v, added.second, to - a.dx);
        store(v, to);
      }
      if constexpr (!kKept)
        store(of_columns[0], to_sums + offset), store(of_columns[1], to_sums + s.D + offset);
    });
    if (a.mask != nullptr) clear_padding(s, plan, at, tile, now, a.dx);
    __syncwarp();  // the steps have been read
  };
  go_through_tiles(plan, sum_up, finish, start);

  if (!kKept) return;
  for (int lanes = 1 << plan.row_bits; lanes < 32; lanes *= 2) {  // over the warp's rows
#pragma unroll
    for (int j = 0; j < V; ++j) {
      of_columns[0][j] += __shfl_xor_sync(~0u, of_columns[0][j], lanes);
      of_columns[1][j] += __shfl_xor_sync(~0u, of_columns[1][j], lanes);
    }
  }
  if (at.row > 0 || at.first >= plan.K) return;
  store(of_columns[0], to_sums);
  store(of_columns[1], to_sums + s.D);
}

// launch.operator()<V, kKept>(plan)
template <class T, class F, class... P>
void with_plan(const TimestepNormShape& s, int rows, F&& launch, const P*... pointers) {
  with_pack_width<T>(
      s.D / s.G,
      [&]<int V>(Width<V>) {
        const Plan plan(s, V, rows);
        if (plan.K <= 32 * V) {
          launch.template operator()<V, true>(plan);
        } else {
          launch.template operator()<V, false>(plan);
        }
      },
      pointers...);
}

StepLaunch clusters(const TimestepNormShape& s, const Plan& plan, std::size_t shared, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(plan.blocks);
  return {dim3(grid_size(s.B * plan.slices), 1, blocks), kThreads, shared, stream, blocks};
}
template <class Kernel>
void allow_all_shared_memory(Kernel kernel, std::size_t bytes) {
  allow_shared_memory(kernel, bytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                       cudaSharedmemCarveoutMaxShared);
}

// Clusters of 0, 1, ... blocks that run at once, kBlocks on a multiprocessor.
using MostClusters = std::array<int, 9>;
MostClusters most_clusters() {
  constexpr std::size_t kShared = 112 * 1024;
  const auto kernel = backward<Bfloat16, 8, true>;
  allow_all_shared_memory(kernel, kShared);
  MostClusters most{};
  for (unsigned blocks = 2; is_hopper() && blocks < most.size(); ++blocks) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1, 1, blocks};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1, 1, blocks), config.blockDim = dim3(kThreads), config.dynamicSmemBytes = kShared;
    config.attrs = &attribute, config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&most[blocks], kernel, &config) != cudaSuccess) most[blocks] = 0;
  }
  cudaGetLastError();  // a size that the device does not know is none
  return most;
}

}  // namespace

// The largest clusters that all run at once, each warp with some tiles to go through.
std::int64_t timestep_norm_units(const TimestepNormShape& s) {
  constexpr std::int64_t kFeatures = 64, kSteps = 64;  // of a chain; of a warp at least
  static const MostClusters most = most_clusters();
  const std::int64_t groups = std::max(kFeatures * s.G / s.D, std::int64_t{1}),
                     chains = s.B * ceil_div(s.G, groups);
  std::int64_t blocks = 1;
  for (std::int64_t n = 2; n < static_cast<std::int64_t>(most.size()); ++n) {
    if (chains <= most[static_cast<std::size_t>(n)] && n * kWarps * kSteps <= s.L) blocks = n;
  }
  return blocks * kWarps;
}

template <class T>
void timestep_norm_forward(const TimestepNormShape& s, const TimestepNormForward<T>& a,
                           std::int64_t* last_count, cudaStream_t stream) {
  with_plan<T>(
      s, kForwardRows,
      [&]<int V, bool kKept>(const Plan& plan) {
        const std::size_t shared = forward_bytes<T, V, kKept>(plan);
        allow_all_shared_memory(forward<T, V, kKept>, shared);
        launch_step(clusters(s, plan, shared, stream), forward<T, V, kKept>, s, a, last_count, plan);
      },
      a.x, a.weight, a.bias, a.y);
}

template <class T>
void timestep_norm_backward(const TimestepNormShape& s, const TimestepNormBackward<T>& a,
                            const TimestepNormAdded<T>& added, float* sums, cudaStream_t stream) {
  with_plan<T>(
      s, kBackwardRows,
      [&]<int V, bool kKept>(const Plan& plan) {
        const std::size_t shared = backward_bytes<T, V, kKept>(plan);
        allow_all_shared_memory(backward<T, V, kKept>, shared);
        launch_step(clusters(s, plan, shared, stream), backward<T, V, kKept>, s, a, added, plan, sums);
      },
      a.x, a.weight, a.dy, a.dx, added.first, added.second);
}

template void timestep_norm_forward(const TimestepNormShape&, const TimestepNormForward<float>&,
                                    std::int64_t*, cudaStream_t);
template void timestep_norm_forward(const TimestepNormShape&, const TimestepNormForward<Bfloat16>&,
                                    std::int64_t*, cudaStream_t);
template void timestep_norm_backward(const TimestepNormShape&, const TimestepNormBackward<float>&,
                                     const TimestepNormAdded<float>&, float*, cudaStream_t);
template void timestep_norm_backward(const TimestepNormShape&, const TimestepNormBackward<Bfloat16>&,
                                     const TimestepNormAdded<Bfloat16>&, float*, cudaStream_t);

}  // namespace megalodon::ops::cuda
