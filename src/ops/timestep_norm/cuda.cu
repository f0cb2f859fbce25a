#include "ops/timestep_norm/cuda.h"

#include <cuda_pipeline.h>
#include <math_constants.h>

#include "ops/cuda_device.h"

// Shapes: B batch, L steps, D features, G groups, K = D/G features of a group.
//
// With S and Q the sums of u/K and u^2/K, u = x - center, over the features of a group and all n counted
// steps so far, mean = center + S/n and var = Q/n - (S/n)^2. So both passes are prefix sums of two numbers in
// float64: forward of S and Q over the steps, backward of their gradients, from the last step on. The center
// is the mean before the first step, 0 where nothing was counted: with much counted, means hardly differ from
// it.
//
// One kernel each way. A tile is kSteps steps of as many groups as a warp reads at once. A block reads it
// once, sums over the features, waits for the sums of the tiles before it, and writes the result; its next
// tile is on the way meanwhile. All blocks would wait for the slowest and then all read, all compute, all
// write: so a tile goes through its block in two parts, and between the first and the second comes the first
// part of the block's next tile. A tile's sum is told long before the tiles after it ask, and hardly any
// waits.
namespace megalodon::ops::cuda {
namespace {

constexpr int kSteps = kTimestepNormTile, kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = kSteps / kWarps;        // of a thread: steps `warp`, `warp` + kWarps, ...
constexpr int kChunk = 32;                    // tiles
static_assert(kSteps == 32 && kChunk == 32);  // a lane each
// Blocks of a multiprocessor, by their registers and, backward, shared memory; multiprocessors.
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3, kProcessors = 132;

struct alignas(16) Sums {
  double s, q;
};
__device__ Sums operator+(Sums a, Sums b) {
  return {a.s + b.s, a.q + b.q};
}

std::int64_t count_tiles(const TimestepNormShape& s) {
  return ceil_div(s.L, kSteps);
}
std::int64_t count_totals(const TimestepNormShape& s) {
  const std::int64_t tiles = count_tiles(s);
  return s.B * s.G * (tiles + ceil_div(tiles, kChunk));
}

// How the groups lie in tiles, and memory for what blocks tell each other, which starts as all ones.
struct Plan {
  int K, lane_bits, groups;  // log2 of the lanes of a group; groups of a warp, which are those of a tile
  float scale;               // 1/K
  int slices, tiles;         // tiles across the groups and along the steps of a sequence
  int last_steps;            // of the last of those
  unsigned chains;           // of tiles, along the steps
  unsigned* taken;           // tickets, less one
  Sums* totals;              // [B, G, tiles + chunks]

  // V features a lane.
  Plan(const TimestepNormShape& s, int V, void* work)
      : K(static_cast<int>(s.D / s.G)),
        lane_bits(0),
        scale(1 / static_cast<float>(K)),
        taken(static_cast<unsigned*>(work)),
        totals(static_cast<Sums*>(work) + 1) {
    while (V << lane_bits < K && lane_bits < 5) ++lane_bits;
    groups = 32 >> lane_bits;
    slices = static_cast<int>(ceil_div(s.G, groups)), tiles = static_cast<int>(count_tiles(s));
    last_steps = static_cast<int>(s.L - std::int64_t{tiles - 1} * kSteps);
    chains = static_cast<unsigned>(s.B * slices);
  }
  __device__ int lanes() const { return 1 << lane_bits; }
  unsigned blocks(int of_processor) const {
    return grid_size(std::int64_t{chains} * tiles, of_processor * kProcessors);
  }
};

// Tiles have their turns by tickets, of thread 0. A block may hold several, but waits for the smaller first,
// and a tile waits only for tiles of smaller tickets: those are with blocks that run.
__device__ unsigned take_ticket(const Plan& plan) {
  return threadIdx.x == 0 ? atomicAdd(plan.taken, 1) : 0;
}
// Where a tile is.
struct Place {
  int b, first_group, turn;  // the turn among the tiles of the sequence, plan.tiles or more: none is left
};
__device__ Place place_of(const Plan& plan, unsigned ticket) {
  ++ticket;  // the memory began with all ones
  const unsigned turn = ticket / plan.chains, chain = ticket % plan.chains, b = chain / plan.slices;
  return {static_cast<int>(b), static_cast<int>(chain - b * plan.slices) * plan.groups,
          static_cast<int>(turn)};
}

// A thread's share of a tile: V columns of the rows, and those 32 V further on where a group is wider.
template <int V, bool kKept>
struct Share {
  int b, first_group, groups, tile, steps;  // of the tile: its groups, its index along the steps, its steps
  int g, first;                             // the thread's group of the tile; its first feature of the group

  __device__ Share(const TimestepNormShape& s, const Plan& plan, Place at, bool backward)
      : b(at.b),
        first_group(at.first_group),
        groups(min(static_cast<int>(s.G) - first_group, plan.groups)),
        tile(backward ? plan.tiles - 1 - at.turn : at.turn),
        steps(tile == plan.tiles - 1 ? plan.last_steps : kSteps),
        g(lane() >> plan.lane_bits),
        first(g < groups ? (lane() & (plan.lanes() - 1)) * V : plan.K) {}  // none
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int step(int r) { return r * kWarps + warp(); }  // of the tile
  __device__ bool has_row(int r) const { return step(r) < steps; }
  __device__ std::int64_t first_step() const { return std::int64_t{tile} * kSteps; }
  __device__ std::int64_t row(const TimestepNormShape& s) const { return b * s.L + first_step() + warp(); }
  __device__ int group() const { return first_group + min(g, groups - 1); }
  __device__ int column(const Plan& plan) const { return group() * plan.K + first; }
  __device__ std::int64_t first_element(const TimestepNormShape& s, const Plan& plan) const {
    return row(s) * s.D + column(plan);
  }
  __device__ bool is_first() const { return first == 0; }  // lane of a group
  // f(offset of the columns)
  template <class F>
  __device__ void for_columns(const Plan& plan, F&& f) const {
    for (int offset = 0; first + offset < plan.K; offset += 32 * V) {
      f(offset);
      if constexpr (kKept) break;
    }
  }
  // f(step, group of the tile, index in [B, L, G]) for the warp's rows, shared by its lanes.
  template <class F>
  __device__ void for_statistics(const TimestepNormShape& s, const Plan& plan, F&& f) const {
    const int group_bits = 5 - plan.lane_bits;
#pragma unroll 1
    for (int i = lane(); i < kRows << group_bits; i += 32) {
      const int r = i >> group_bits, g = i & (plan.groups - 1);
      if (g < groups && has_row(r)) f(step(r), g, (row(s) + r * kWarps) * s.G + first_group + g);
    }
  }
};

// A thread's rows of a tile of x. They come once, into shared memory, where only the thread itself reads
// them; where a group is too wide they are read from x each time. What is read of rows that are not there
// means nothing.
template <class T, int V, bool kKept>
struct Rows {
  static constexpr int kPacks = kKept ? kRows * kThreads : 0;  // of a tile

  const T* x;  // the first element
  std::int64_t pitch;
  Pack<T, V>* kept;

  __device__ Rows(const T* x, const TimestepNormShape& s, const Plan& plan, const Share<V, kKept>& own,
                  uint4* shared, int place)
      : x(x + own.first_element(s, plan)),
        pitch(kWarps * s.D),
        kept(reinterpret_cast<Pack<T, V>*>(shared) + place * kPacks + threadIdx.x) {}

  // To be committed and waited for.
  __device__ void start(const Plan& plan, const Share<V, kKept>& own) const {
    if (!kKept || own.first >= plan.K) return;
    const T* from = x;
#pragma unroll
    for (int r = 0; r < kRows; ++r, from += pitch) {
      if (!own.has_row(r)) break;
      Pack<T, V>* const to = kept + r * kThreads;
      if constexpr (sizeof(*to) >= 4) {
        __pipeline_memcpy_async(to, from, sizeof(*to));
      } else {
        *to = load_pack<V>(from);
      }
    }
  }
  __device__ void read(const Share<V, kKept>& own, int r, int offset, float (&to)[V]) const {
    if constexpr (kKept) {
      unpack(kept[r * kThreads], to);
    } else {
      unpack(own.has_row(r) ? load_pack<V>(x + r * pitch + offset) : Pack<T, V>{}, to);
    }
  }
};

// Counted steps of sequence b among `begin` .. `end` - 1, for all threads of the block.
__device__ std::int64_t counted(const std::uint8_t* mask, const TimestepNormShape& s, std::int64_t b,
                                std::int64_t begin, std::int64_t end) {
  if (mask == nullptr) return end - begin;
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  unsigned mine = 0;
#pragma unroll 4
  for (std::int64_t t = begin + threadIdx.x; t < end; t += kThreads) mine += mask[b * s.L + t] == 0;
  mine = __reduce_add_sync(~0u, mine);
  if (threadIdx.x % 32 == 0) atomicAdd(&total, static_cast<unsigned long long>(mine));
  __syncthreads();
  return static_cast<std::int64_t>(total);
}

// Which steps of a tile count: those that are there and not padded.
struct Counts {
  unsigned bits;
  std::int64_t before;  // counted steps before the tile, earlier calls' too

  Counts() = default;
  template <int V, bool kKept>
  __device__ Counts(const std::uint8_t* mask, const TimestepNormShape& s, const Share<V, kKept>& own) {
    bits = ~0u >> (kSteps - own.steps);
    if (mask == nullptr) return;
    const int t = min(own.lane(), own.steps - 1);
    bits &= __ballot_sync(~0u, mask[own.b * s.L + own.first_step() + t] == 0);
  }
  __device__ bool has(int t) const { return (bits >> t & 1) != 0; }
  __device__ std::int64_t until(int t) const {  // with t
    return before + __popc(bits & (~0u >> (kSteps - 1 - t)));
  }
};

// Zeros where steps are padded.
template <class T, int V, bool kKept>
__device__ void clear_padding(const TimestepNormShape& s, const Plan& plan, const Share<V, kKept>& own,
                              const Counts& counts, T* of) {
  own.for_columns(plan, [&](int offset) {
    T* to = of + own.first_element(s, plan) + offset;
    for (int r = 0; r < kRows; ++r, to += kWarps * s.D) {
      if (own.has_row(r) && !counts.has(own.step(r))) store<V>({}, to);
    }
  });
}

// What is known of each step and group of a tile, in shared memory.
template <class Step>
struct StepArray {
  Step* data;
  static constexpr int kPitch = kSteps + 1;
  __device__ Step& operator()(int t, int g) const { return data[g * kPitch + t]; }
};
// y = ((x - mean) rstd + rest) (1 + weight) + bias: mean is center + distance rounded, rest the rounding.
union ForwardStep {
  struct {
    float distance, variance;
  } alone;    // of the step's features
  Sums sums;  // of the tile's steps until it, with it
  struct {
    float distance, rstd, mean, rest;
  } all;  // of all steps until it
};
// dx = h rstd + slope (x - mean) + constant, h = dy (1 + weight).
struct alignas(16) BackwardStep {
  float distance, rstd, slope, constant;  // the last two: the sums of h (x - mean) and h until then
};
template <class Step>
std::size_t step_bytes(const Plan& plan) {
  return sizeof(Step) * StepArray<Step>::kPitch * plan.groups;
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

__device__ float reciprocal_root(float x) {
  const float r = rsqrtf(x);
  return fmaf(0.5f * r, fmaf(-x * r, r, 1), r);
}

// Each becomes its sum over `lanes` neighbouring lanes.
__device__ void group_sums(float (&x)[kRows], unsigned lanes) {
  for (unsigned offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] += __shfl_xor_sync(~0u, x[i], offset);
  }
}

// Prefix sums of a warp's numbers, each with itself. Returns the sum of all.
__device__ Sums scan(Sums& sum) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Sums before{__shfl_up_sync(~0u, sum.s, offset), __shfl_up_sync(~0u, sum.q, offset)};
    if (threadIdx.x % 32 >= offset) sum = before + sum;
  }
  return {__shfl_sync(~0u, sum.s, 31), __shfl_sync(~0u, sum.q, 31)};
}

// All ones is a NaN that no sum becomes: a number tells by itself that it is there.
__device__ void publish(Sums sums, Sums* to) {
  const double s = isnan(sums.s) ? CUDART_NAN : sums.s, q = isnan(sums.q) ? CUDART_NAN : sums.q;
  asm volatile("st.relaxed.gpu.global.v2.f64 [%0], {%1, %2};" ::"l"(to), "d"(s), "d"(q) : "memory");
}
__device__ Sums look(const Sums* from) {
  Sums sums;
  asm volatile("ld.relaxed.gpu.global.v2.f64 {%0, %1}, [%2];"
               : "=d"(sums.s), "=d"(sums.q)
               : "l"(from)
               : "memory");
  return sums;
}
__device__ bool is_there(Sums sums) {
  return __double_as_longlong(sums.s) != -1 && __double_as_longlong(sums.q) != -1;
}

// What the tiles of a group tell each other along the steps of a sequence, by their turns: each its sum, the
// last of a chunk the sum until it. For a warp.
struct Chain {
  Sums *of_tile, *until_chunk;  // with it

  __device__ Chain(const TimestepNormShape& s, const Plan& plan, std::int64_t b, std::int64_t group) {
    const int chunks = (plan.tiles + kChunk - 1) / kChunk;
    of_tile = plan.totals + (b * s.G + group) * (std::int64_t{plan.tiles} + chunks);
    until_chunk = of_tile + plan.tiles;
  }
  __device__ void tell(int turn, Sums total) const {
    if (threadIdx.x % 32 == 0) publish(total, of_tile + turn);
  }
  // `until` of the last lane is the sum until this tile.
  __device__ void pass_on(int turn, Sums until) const {
    if (turn % kChunk == kChunk - 1 && threadIdx.x % 32 == 31) publish(until, until_chunk + turn / kChunk);
  }
  // The sum of the tiles before. Always added up in the same order: what is before the chunk before, from its
  // last tile, and each tile since then. So a chunk's time goes by until that first sum is needed.
  __device__ Sums before(int turn) const {
    const int lane = threadIdx.x % 32, chunk = turn / kChunk, first = max(chunk - 1, 0) * kChunk + lane,
              second = first + kChunk;
    // A chunk's last tile is never before another of its chunk: its lane takes what was before both chunks.
    const bool takes_chunk = chunk > 1 && lane == 31;
    const Sums* const from[2] = {of_tile + first, takes_chunk ? until_chunk + chunk - 2 : of_tile + second};
    bool missing[2] = {first < turn, takes_chunk || second < turn};
    Sums sums[2] = {};
    do {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!missing[i]) continue;
        sums[i] = look(from[i]);
        missing[i] = !is_there(sums[i]);
      }
    } while (__any_sync(~0u, missing[0] || missing[1]));
    Sums sum = sums[0] + sums[1];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      sum = sum + Sums{__shfl_xor_sync(~0u, sum.s, offset), __shfl_xor_sync(~0u, sum.q, offset)};
    return sum;
  }
};

// Three tiles are in shared memory: one to be written, one to be summed up, one on its way.
constexpr int kForwardTiles = 3;

template <class T, int V, bool kKept>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    forward(TimestepNormShape s, TimestepNormForward<T> a, Plan plan) {
  extern __shared__ uint4 shared[];
  __shared__ Place places[4];  // of tile i of the block: i % 4
  using Tile = Rows<T, V, kKept>;
  auto* const steps =
      reinterpret_cast<ForwardStep*>(reinterpret_cast<Pack<T, V>*>(shared) + kForwardTiles * Tile::kPacks);
  const auto step_array = [&](int i) {
    return StepArray<ForwardStep>{steps + i % 2 * StepArray<ForwardStep>::kPitch * plan.groups};
  };
  const auto tile_of = [&](const Share<V, kKept>& own, int i) {
    return Tile(a.x, s, plan, own, shared, i % kForwardTiles);
  };
  const auto is_tile = [&](int i) { return places[i % 4].turn < plan.tiles; };
  const auto start = [&](int i) {
    if (is_tile(i)) {
      const Share<V, kKept> own(s, plan, places[i % 4], false);
      tile_of(own, i).start(plan, own);
    }
    __pipeline_commit();
  };
  // Mean and variance of each step of tile i; all but the tile that was started last have come.
  const auto sum_up = [&](int i) {
    const Share<V, kKept> own(s, plan, places[i % 4], false);
    const Tile x = tile_of(own, i);
    const StepArray<ForwardStep> step = step_array(i);
    const float mean_before = a.mean[own.b * s.G + own.group()],
                center = a.count[own.b] > 0 ? mean_before : 0;
    __pipeline_wait_prior(1);
    float mean[kRows] = {}, squares[kRows] = {};
    own.for_columns(plan, [&](int offset) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[V];
        x.read(own, r, offset, v);
#pragma unroll
        for (int j = 0; j < V; ++j) mean[r] += v[j];
      }
    });
    group_sums(mean, plan.lanes());
#pragma unroll
    for (int r = 0; r < kRows; ++r) mean[r] *= plan.scale;
    own.for_columns(plan, [&](int offset) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[V];
        x.read(own, r, offset, v);
#pragma unroll
        for (int j = 0; j < V; ++j) squares[r] += (v[j] - mean[r]) * (v[j] - mean[r]);
      }
    });
    group_sums(squares, plan.lanes());
    if (own.is_first()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        step(own.step(r), own.g).alone = {mean[r] - center, squares[r] * plan.scale};
    }
  };
  // The sums of tile i, its own told to the tiles after it.
  const auto tell_sums = [&](int i) {
    const Share<V, kKept> own(s, plan, places[i % 4], false);
    const Counts counts(a.mask, s, own);
    for (int g = kWarps - 1 - own.warp(); g < own.groups; g += kWarps) {  // other warps than those that wait
      ForwardStep& step = step_array(i)(own.lane(), g);
      const double distance = step.alone.distance;
      Sums sums{0, 0};
      if (counts.has(own.lane())) sums = {distance, step.alone.variance + distance * distance};
      const Sums total = scan(sums);
      Chain(s, plan, own.b, own.first_group + g).tell(own.tile, total);
      step.sums = sums;
    }
  };

  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) places[i] = place_of(plan, take_ticket(plan));
  }
  __syncthreads();
  start(0);
  for (int coming = 0; coming == 0 || is_tile(coming - 1); ++coming) {
    start(coming + 1);
    const unsigned ticket = take_ticket(plan);
    if (is_tile(coming)) sum_up(coming);
    if (threadIdx.x == 0) places[(coming + 2) % 4] = place_of(plan, ticket);
    __syncthreads();
    if (is_tile(coming)) tell_sums(coming);
    if (coming == 0) continue;

    const int i = coming - 1;
    const Share<V, kKept> own(s, plan, places[i % 4], false);
    const Tile x = tile_of(own, i);
    const StepArray<ForwardStep> step = step_array(i);
    Counts counts(a.mask, s, own);
    const std::int64_t prior = a.count[own.b];
    counts.before = prior + counted(a.mask, s, own.b, 0, own.first_step());

    // The statistics with each step.
    for (int g = own.warp(); g < own.groups; g += kWarps) {
      const std::int64_t group = std::int64_t{own.first_group} + g, of_state = own.b * s.G + group;
      const int t = own.lane();
      const float mean_0 = a.mean[of_state], var_0 = a.var[of_state], from = prior > 0 ? mean_0 : 0;
      const Chain chain(s, plan, own.b, group);
      Sums sums = chain.before(own.tile) + step(t, g).sums;
      chain.pass_on(own.tile, sums);
      if (prior > 0) sums.q += static_cast<double>(prior) * var_0;
      const std::int64_t n = counts.until(t);
      const Divisor by_n(n);
      const double distance = n > prior ? by_n(sums.s) : mean_0 - from,
                   var = n > prior ? fmax(0.0, by_n(sums.q) - distance * distance) : var_0;
      const float mean = static_cast<float>(from + distance),
                  rstd = reciprocal_root(static_cast<float>(var) + a.eps);
      step(t, g).all = {static_cast<float>(distance), rstd, mean,
                        static_cast<float>(mean - (from + distance)) * rstd};
      if (own.tile == plan.tiles - 1 && t == kSteps - 1)
        a.last_mean[of_state] = mean, a.last_var[of_state] = static_cast<float>(var);
      if (own.tile == 0 && t == 0 && a.step_mean != nullptr)
        a.step_mean[own.b * (s.L + 1) * s.G + group] = from;
    }
    __syncthreads();

    own.for_columns(plan, [&](int offset) {
      float weight[V], bias[V];
      load(a.weight + own.column(plan) + offset, weight);
      load(a.bias + own.column(plan) + offset, bias);
#pragma unroll
      for (int j = 0; j < V; ++j) weight[j] += 1;
      T* to = a.y + own.first_element(s, plan) + offset;
#pragma unroll
      for (int r = 0; r < kRows; ++r, to += x.pitch) {
        const auto now = step(own.step(r), own.g).all;
        float y[V];
        x.read(own, r, offset, y);
#pragma unroll
        for (int j = 0; j < V; ++j)
          y[j] = fmaf(fmaf(y[j] - now.mean, now.rstd, now.rest), weight[j], bias[j]);
        if (counts.has(own.step(r))) store(y, to);
      }
    });
    if (a.mask != nullptr) clear_padding(s, plan, own, counts, a.y);
    if (a.step_mean != nullptr) {
      own.for_statistics(s, plan, [&](int t, int g, std::int64_t to) {
        const auto now = step(t, g).all;
        a.step_mean[to + (own.b + 1) * s.G] = now.distance, a.step_rstd[to] = now.rstd;
      });
    }
    __syncwarp();  // the steps have been read
  }
}

// What is added to a tile of dx, into the second cache.
template <class T, int V, bool kKept>
__device__ void fetch_added(const T* added, const TimestepNormShape& s, const Plan& plan,
                            const Share<V, kKept>& own) {
  if (added == nullptr) return;
  own.for_columns(plan, [&](int offset) {
    const T* from = added + own.first_element(s, plan) + offset;
    for (int r = 0; r < kRows; ++r, from += kWarps * s.D) {
      if (own.has_row(r)) asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
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

// The gradients of weight and bias of a tile are summed in what was its x, V columns a thread in packs.
template <int V>
constexpr int kSumsOfPack = V < 4 ? V : 4;
template <int V>
constexpr int kSumPacks = 2 * V / kSumsOfPack<V>;
template <int V>
using SumPack = Pack<float, kSumsOfPack<V>>;
// What x and dy take in shared memory; those sums have a place there too.
template <class T, int V, bool kKept>
constexpr std::size_t kBackwardTiles =
    kKept ? 4 * Rows<T, V, kKept>::kPacks * sizeof(Pack<T, V>) : kSumPacks<V> * kThreads * sizeof(SumPack<V>);
static_assert(kRows * sizeof(Bfloat16) >= 2 * sizeof(float));

// With u = x - mean and h = dy (1 + weight), the gradients of a step's statistics are
//   d_mean = -rstd sum(h),   d_var = -rstd^3 sum(h u) / 2,
// and S and Q get (d_mean - 2 (mean - center) d_var)/n and d_var/n from it and from every step after, so that
//   dx = h rstd + (dS + 2 (x - center) dQ) / K.
// These two of the lane's step, the last first, and the steps of the tile after it. Returns the tile's sum.
__device__ Sums gradient_sums(const BackwardStep& now, const Counts& counts, Sums& sums) {
  const int t = kSteps - 1 - static_cast<int>(threadIdx.x) % 32;
  sums = {0, 0};
  if (counts.has(t)) {
    const double distance = now.distance;
    const float d_mean = -now.rstd * now.constant, d_var = -0.5f * now.rstd * now.rstd * now.rstd * now.slope;
    const Divisor by_n(counts.until(t));
    sums = {by_n(d_mean - 2 * distance * d_var), by_n(d_var)};
  }
  return scan(sums);
}

// dx of a tile, and the sums over its steps for weight and bias, in the place of its x. For all threads.
template <class T, int V, bool kKept>
__device__ void write_tile(const TimestepNormShape& s, const TimestepNormBackward<T>& a,
                           const TimestepNormAdded<T>& added, const Plan& plan, const Share<V, kKept>& own,
                           const Counts& counts, const Rows<T, V, kKept>& x, const Rows<T, V, kKept>& dy,
                           const StepArray<BackwardStep>& step, float* parameter_sums) {
  const float center = a.step_mean[own.b * (s.L + 1) * s.G + own.group()];
  if (a.mask != nullptr) clear_padding(s, plan, own, counts, a.dx);
  for (int offset = 0; offset < plan.K; offset += 32 * V) {
    float of_columns[2][V] = {};  // gradients of weight and bias
    if (own.first + offset < plan.K) {
      float weight[V];
      load(a.weight + own.column(plan) + offset, weight);
#pragma unroll
      for (int j = 0; j < V; ++j) weight[j] += 1;
      T* to = a.dx + own.first_element(s, plan) + offset;
#pragma unroll
      for (int r = 0; r < kRows; ++r, to += x.pitch) {
        const BackwardStep now = step(own.step(r), own.g);
        const float mean = center + now.distance;
        if (!counts.has(own.step(r))) continue;
        float v[V], d[V];
        x.read(own, r, offset, v);
        dy.read(own, r, offset, d);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float u = v[j] - mean, scaled = d[j] * now.rstd;
          of_columns[0][j] += scaled * u, of_columns[1][j] += d[j];
          v[j] = fmaf(scaled, weight[j], fmaf(now.slope, u, now.constant));
        }
        add_to(v, added.first, to - a.dx);
        add_to(v, added.second, to - a.dx);
        store(v, to);
      }
    }
    __syncthreads();
    constexpr int P = kSumsOfPack<V>;
    auto* const partial = reinterpret_cast<SumPack<V>*>(x.kept - threadIdx.x);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        partial[(k * V + j) / P * kThreads + threadIdx.x].value[j % P] = of_columns[k][j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kSumPacks<V> * 32; i += kThreads) {
      const int pack = i / 32, lane = i % 32, g = lane >> plan.lane_bits, k = pack * P / V;
      const int column = (lane & (plan.lanes() - 1)) * V + offset + pack * P % V;
      if (g >= own.groups || column >= plan.K) continue;
      float sums[P] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const SumPack<V> of_warp = partial[pack * kThreads + w * 32 + lane];
#pragma unroll
        for (int p = 0; p < P; ++p) sums[p] += of_warp.value[p];
      }
      const std::int64_t of_tile = std::int64_t{own.b} * plan.tiles + own.tile;
      store(sums,
            parameter_sums + (of_tile * 2 + k) * s.D + (std::int64_t{own.first_group} + g) * plan.K + column);
    }
  }
}

template <class T, int V, bool kKept>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward(TimestepNormShape s, TimestepNormBackward<T> a, TimestepNormAdded<T> added, Plan plan,
             float* parameter_sums) {
  extern __shared__ uint4 shared[];
  __shared__ Place places[4];      // of tile i of the block: i % 4
  using Tile = Rows<T, V, kKept>;  // twice x and dy: more would be a block less of a multiprocessor
  auto* const steps =
      reinterpret_cast<BackwardStep*>(shared + kBackwardTiles<T, V, kKept> / sizeof(uint4));  // also twice
  const auto step_array = [&](int i) {
    return StepArray<BackwardStep>{steps + i % 2 * StepArray<BackwardStep>::kPitch * plan.groups};
  };
  const auto is_tile = [&](int i) { return places[i % 4].turn < plan.tiles; };
  const auto share_of = [&](int i) { return Share<V, kKept>(s, plan, places[i % 4], true); };
  const auto x_of = [&](const Share<V, kKept>& own, int i) {
    return Tile(a.x, s, plan, own, shared, i % 2 * 2);
  };
  const auto dy_of = [&](const Share<V, kKept>& own, int i) {
    return Tile(a.dy, s, plan, own, shared, i % 2 * 2 + 1);
  };
  const auto start = [&](int i) {
    if (is_tile(i)) {
      const auto own = share_of(i);
      x_of(own, i).start(plan, own);
      dy_of(own, i).start(plan, own);
      fetch_added(added.first, s, plan, own);
      fetch_added(added.second, s, plan, own);
      const auto step = step_array(i);
      own.for_statistics(s, plan, [&](int t, int g, std::int64_t from) {
        __pipeline_memcpy_async(&step(t, g).distance, a.step_mean + from + (own.b + 1) * s.G, 4);
        __pipeline_memcpy_async(&step(t, g).rstd, a.step_rstd + from, 4);
      });
    }
    __pipeline_commit();
  };
  // The gradients of mean and variance of each step of tile i.
  const auto sum_up = [&](int i) {
    const auto own = share_of(i);
    const Tile x = x_of(own, i), dy = dy_of(own, i);
    const auto step = step_array(i);
    const float center = a.step_mean[own.b * (s.L + 1) * s.G + own.group()];
    float weight[V] = {};
    if (own.first < plan.K) load(a.weight + own.column(plan), weight);
    __pipeline_wait_prior(0);
    __syncwarp();  // the steps came for other lanes
    float sum_h[kRows] = {}, sum_hu[kRows] = {};
    own.for_columns(plan, [&](int offset) {
      if (offset > 0) load(a.weight + own.column(plan) + offset, weight);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float mean = center + step(own.step(r), own.g).distance;
        float v[V], d[V];
        x.read(own, r, offset, v);
        dy.read(own, r, offset, d);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float h = fmaf(d[j], weight[j], d[j]);
          sum_h[r] += h, sum_hu[r] += h * (v[j] - mean);
        }
      }
    });
    group_sums(sum_h, plan.lanes());
    group_sums(sum_hu, plan.lanes());
    if (own.is_first()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        BackwardStep& to = step(own.step(r), own.g);
        to.slope = sum_hu[r], to.constant = sum_h[r];
      }
    }
  };

  // The second part of tile i: what comes from the tiles after it, and its gradients.
  const auto finish = [&](int i, const Counts& counts) {
    const auto own = share_of(i);
    const Tile x = x_of(own, i), dy = dy_of(own, i);
    const auto step = step_array(i);
    const std::int64_t last_count = a.last_count[own.b];
    for (int g = own.warp(); g < own.groups; g += kWarps) {
      const std::int64_t group = std::int64_t{own.first_group} + g, of_state = own.b * s.G + group;
      const int t = kSteps - 1 - own.lane(), turn = plan.tiles - 1 - own.tile;
      const double distance = step(t, g).distance;
      const double d_last_mean = a.d_last_mean[of_state], d_last_var = a.d_last_var[of_state],
                   last_mean = a.step_mean[((own.b + 1) * (s.L + 1) - 1) * s.G + group];
      Sums sums;
      gradient_sums(step(t, g), counts, sums);
      const Chain chain(s, plan, own.b, group);
      sums = chain.before(turn) + sums;
      chain.pass_on(turn, sums);
      if (last_count > 0) {
        const Divisor by_n(last_count);
        sums = Sums{by_n(d_last_mean - 2 * last_mean * d_last_var), by_n(d_last_var)} + sums;
      }
      if (counts.has(t)) {
        step(t, g).slope = static_cast<float>(2 * sums.q) * plan.scale;
        step(t, g).constant = static_cast<float>(sums.s + 2 * distance * sums.q) * plan.scale;
      }
      if (own.tile > 0 || t > 0) continue;
      a.d_mean[of_state] = static_cast<float>(last_count > 0 ? counts.before * sums.s : d_last_mean);
      a.d_var[of_state] = static_cast<float>(last_count > 0 ? counts.before * sums.q : d_last_var);
    }
    __syncthreads();

    write_tile(s, a, added, plan, own, counts, x, dy, step, parameter_sums);
    __syncthreads();  // the tile's place is free
  };

  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) places[i] = place_of(plan, take_ticket(plan));
  }
  __syncthreads();
  start(0);
  Counts counts, counts_of_coming;
  for (int coming = 0; coming == 0 || is_tile(coming - 1); ++coming, counts = counts_of_coming) {
    const unsigned ticket = take_ticket(plan);
    if (is_tile(coming)) sum_up(coming);
    if (threadIdx.x == 0) places[(coming + 2) % 4] = place_of(plan, ticket);
    __syncthreads();
    if (is_tile(coming)) {
      const auto own = share_of(coming);
      counts_of_coming = Counts(a.mask, s, own);
      counts_of_coming.before = a.last_count[own.b] - counted(a.mask, s, own.b, own.first_step(), s.L);
      for (int g = kWarps - 1 - own.warp(); g < own.groups; g += kWarps) {
        Sums sums;
        const Sums total =
            gradient_sums(step_array(coming)(kSteps - 1 - own.lane(), g), counts_of_coming, sums);
        Chain(s, plan, own.b, own.first_group + g).tell(plan.tiles - 1 - own.tile, total);
      }
    }
    if (coming > 0) finish(coming - 1, counts);
    start(coming + 1);
  }
}

// launch.operator()<V, kKept>(plan) where all is ready.
template <class T, class F, class... P>
void with_plan(const TimestepNormShape& s, void* work, cudaStream_t stream, F&& launch,
               const P*... pointers) {
  cudaMemsetAsync(work, 0xff, timestep_norm_work(s), stream);
  with_pack_width<T>(
      s.D / s.G,
      [&]<int V>(Width<V>) {
        const Plan plan(s, V, work);
        if (plan.K <= 32 * V) {
          launch.template operator()<V, true>(plan);
        } else {
          launch.template operator()<V, false>(plan);
        }
      },
      pointers...);
}

}  // namespace

std::size_t timestep_norm_work(const TimestepNormShape& s) {
  return sizeof(Sums) * static_cast<std::size_t>(1 + count_totals(s));
}

template <class T>
void timestep_norm_forward(const TimestepNormShape& s, const TimestepNormForward<T>& a, void* work,
                           cudaStream_t stream) {
  with_plan<T>(
      s, work, stream,
      [&]<int V, bool kKept>(const Plan& plan) {
        const std::size_t shared = kForwardTiles * Rows<T, V, kKept>::kPacks * sizeof(Pack<T, V>) +
                                   2 * step_bytes<ForwardStep>(plan);
        allow_shared_memory(forward<T, V, kKept>, shared);
        forward<T, V, kKept><<<plan.blocks(kForwardBlocks), kThreads, shared, stream>>>(s, a, plan);
      },
      a.x, a.weight, a.bias, a.y);
}

template <class T>
void timestep_norm_backward(const TimestepNormShape& s, const TimestepNormBackward<T>& a,
                            const TimestepNormAdded<T>& added, void* work, float* sums, cudaStream_t stream) {
  with_plan<T>(
      s, work, stream,
      [&]<int V, bool kKept>(const Plan& plan) {
        const std::size_t shared = kBackwardTiles<T, V, kKept> + 2 * step_bytes<BackwardStep>(plan);
        allow_shared_memory(backward<T, V, kKept>, shared);
        backward<T, V, kKept>
            <<<plan.blocks(kBackwardBlocks), kThreads, shared, stream>>>(s, a, added, plan, sums);
      },
      a.x, a.weight, a.dy, a.dx, added.first, added.second);
}

template void timestep_norm_forward(const TimestepNormShape&, const TimestepNormForward<float>&, void*,
                                    cudaStream_t);
template void timestep_norm_forward(const TimestepNormShape&, const TimestepNormForward<Bfloat16>&, void*,
                                    cudaStream_t);
template void timestep_norm_backward(const TimestepNormShape&, const TimestepNormBackward<float>&,
                                     const TimestepNormAdded<float>&, void*, float*, cudaStream_t);
template void timestep_norm_backward(const TimestepNormShape&, const TimestepNormBackward<Bfloat16>&,
                                     const TimestepNormAdded<Bfloat16>&, void*, float*, cudaStream_t);

}  // namespace megalodon::ops::cuda
