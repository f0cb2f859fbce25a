#include "ops/timestep_norm/cuda.h"

#include <math_constants.h>

#include "ops/cuda_rows.h"

// Shapes: B batch, L steps, D features, G groups, K = D/G features of a group.
//
// With S and Q the sums of u/K and u^2/K, u = x - center, over the features of a group and all n counted
// steps so far, mean = center + S/n and var = Q/n - (S/n)^2. So both passes are prefix sums of two numbers in
// float64: forward of S and Q over the steps, backward of their gradients, from the last step on. The center
// is the mean before the first step, 0 where nothing was counted: with much counted, means hardly differ from
// it.
//
// One kernel each way. A tile is kSteps steps of as many groups as a warp reads at once. A block reads it
// once, sums over the features, waits for the sums of the tiles before it, and writes the result. All blocks
// wait for the slowest, and would then all read, then all compute, then all write: so each has its next tile
// on the way while it waits and writes.
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
  int K, lanes, groups;  // lanes of a group; groups of a warp, which are those of a tile
  float scale;           // 1/K
  int slices, tiles;     // tiles across the groups and along the steps of a sequence
  unsigned tickets;      // of all tiles
  unsigned* taken;       // tickets, less one
  Sums* totals;          // [B, G, tiles + chunks]

  // V features a lane.
  Plan(const TimestepNormShape& s, int V, void* work)
      : K(static_cast<int>(s.D / s.G)),
        lanes(1),
        scale(1 / static_cast<float>(K)),
        taken(static_cast<unsigned*>(work)),
        totals(static_cast<Sums*>(work) + 1) {
    while (lanes * V < K && lanes < 32) lanes *= 2;
    groups = 32 / lanes;
    slices = static_cast<int>(ceil_div(s.G, groups)), tiles = static_cast<int>(count_tiles(s));
    tickets = static_cast<unsigned>(s.B * slices * tiles);
  }
  unsigned blocks(int of_processor) const { return grid_size(tickets, of_processor * kProcessors); }
};

// Tiles have their turns by tickets. Whoever waits for the tiles before its own waits for blocks that run: a
// block publishes its tile's sums before it waits, and takes its tickets in order.
__device__ unsigned take_ticket(const Plan& plan) {
  return threadIdx.x == 0 ? atomicAdd(plan.taken, 1) : 0;
}
// That of thread 0, for all threads, which meet here.
__device__ unsigned share_ticket(unsigned ticket) {
  __shared__ unsigned shared;
  if (threadIdx.x == 0) shared = ticket;
  __syncthreads();
  return shared + 1;  // the memory began with all ones
}

// A thread's share of a tile: V columns of the rows, and those 32 V further on where a group is wider. What
// takes 64 bits is computed where it is wanted, to hold few registers.
template <int V, bool kKept>
struct Share {
  int turn, tile;              // among those of the sequence
  int b, first_group, groups;  // of the tile
  int g, first;                // the thread's group of the tile; its first feature of the group

  __device__ Share(const TimestepNormShape& s, const Plan& plan, unsigned ticket, bool backward) {
    const unsigned chains = plan.tickets / plan.tiles, chain = ticket % chains;
    turn = static_cast<int>(ticket / chains);
    tile = backward ? plan.tiles - 1 - turn : turn;
    b = static_cast<int>(chain / plan.slices);
    first_group = static_cast<int>(chain % plan.slices) * plan.groups;
    groups = min(static_cast<int>(s.G) - first_group, plan.groups);
    g = lane() / plan.lanes;
    first = g < groups ? lane() % plan.lanes * V : plan.K;  // none
  }
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int step(int r) { return r * kWarps + warp(); }  // of the tile
  __device__ std::int64_t first_step() const { return std::int64_t{tile} * kSteps; }
  __device__ std::int64_t row(const TimestepNormShape& s, int r) const {  // of [B, L]
    return b * s.L + first_step() + step(r);
  }
  __device__ bool has_row(const TimestepNormShape& s, int r) const { return first_step() + step(r) < s.L; }
  __device__ int rows(const TimestepNormShape& s) const {
    const std::int64_t left = s.L - first_step() - warp();
    return static_cast<int>(min((left + kWarps - 1) / kWarps, std::int64_t{kRows}));
  }
  __device__ std::int64_t group() const { return first_group + min(g, groups - 1); }
  __device__ std::int64_t column(const Plan& plan) const { return group() * plan.K + first; }
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

// The thread's part of a tile of x, in the block's shared memory.
template <class T, int V, bool kKept>
constexpr int kTilePacks = kKept ? kRows * kThreads : 0;
template <class T, int V, bool kKept>
__device__ Tile<T, V, kRows, kKept> tile_of(const T* x, const TimestepNormShape& s, const Plan& plan,
                                            const Share<V, kKept>& own, Pack<T, V>* kept) {
  return {x + own.row(s, 0) * s.D + own.column(plan), kWarps * s.D, own.rows(s), kept};
}

// Counted steps of sequence b among `begin` .. `end` - 1, for all threads of the block.
__device__ std::int64_t counted(const std::uint8_t* mask, const TimestepNormShape& s, std::int64_t b,
                                std::int64_t begin, std::int64_t end) {
  if (mask == nullptr) return end - begin;
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (std::int64_t t = begin + threadIdx.x; t < end; t += kThreads) mine += mask[b * s.L + t] == 0;
  atomicAdd(&total, mine);
  __syncthreads();
  return static_cast<std::int64_t>(total);
}

// Which steps of a tile count: those that are there and not padded.
struct Counts {
  unsigned bits;
  std::int64_t before;  // counted steps before the tile, earlier calls' too

  template <int V, bool kKept>
  __device__ Counts(const std::uint8_t* mask, const TimestepNormShape& s, const Share<V, kKept>& own) {
    const std::int64_t t = own.first_step() + own.lane();
    bits = __ballot_sync(~0u, t < s.L && (mask == nullptr || mask[own.b * s.L + t] == 0));
  }
  __device__ bool has(int t) const { return (bits >> t & 1) != 0; }
  __device__ std::int64_t until(int t) const {  // with t
    return before + __popc(bits & (~0u >> (kSteps - 1 - t)));
  }
};

// What is known of each step and group of a tile, in shared memory.
template <class Step>
struct StepArray {
  Step* data;
  static constexpr int kPitch = kSteps + 1;
  __device__ Step& operator()(int t, int g) const { return data[g * kPitch + t]; }
};
// y = ((x - mean) rstd + rest) (1 + weight) + bias: mean is center + distance rounded, rest the rounding.
struct alignas(16) ForwardStep {
  float distance, rstd, mean, rest;  // rstd: the step's variance until it is scanned
};
// dx = h rstd + slope (x - mean) + constant, h = dy (1 + weight).
struct alignas(16) BackwardStep {
  float distance, rstd, slope, constant;  // the last two: gradients of variance and mean until then
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
__device__ void group_sums(float (&x)[kRows], int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
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

// The sum of the tiles that had their turn before in the sequence, whose own is `own`; for the warp of a
// group. Always added up in the same order: what is before the chunk before, from its last tile, and each
// tile since then. So a chunk's time goes by until that first sum is needed.
__device__ Sums sum_before(const TimestepNormShape& s, const Plan& plan, std::int64_t b, std::int64_t group,
                           int turn, Sums own) {
  const int lane = threadIdx.x % 32, chunk = turn / kChunk, chunks = (plan.tiles + kChunk - 1) / kChunk;
  Sums* const of_tile = plan.totals + (b * s.G + group) * (std::int64_t{plan.tiles} + chunks);
  Sums* const until_chunk = of_tile + plan.tiles;  // with it
  if (lane == 0) publish(own, of_tile + turn);

  const int first = max(chunk - 1, 0) * kChunk + lane, second = first + kChunk;
  const Sums* from[2] = {first < turn ? of_tile + first : nullptr,
                         second < turn ? of_tile + second : nullptr};
  // `turn` is never the lane's 32nd tile of its chunk before it: the last lane is free for what is before.
  if (chunk > 1 && lane == 31) from[1] = until_chunk + chunk - 2;
  Sums sums[2] = {};
  do {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (from[i] != nullptr) sums[i] = look(from[i]);
    }
  } while (!is_there(sums[0]) || !is_there(sums[1]));
  Sums sum = sums[0] + sums[1];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    sum = sum + Sums{__shfl_xor_sync(~0u, sum.s, offset), __shfl_xor_sync(~0u, sum.q, offset)};
  if (turn % kChunk == kChunk - 1 && lane == 0) publish(sum + own, until_chunk + chunk);
  return sum;
}

template <class T, int V, bool kKept>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    forward(TimestepNormShape s, TimestepNormForward<T> a, Plan plan) {
  extern __shared__ uint4 shared[];
  auto* const kept = reinterpret_cast<Pack<T, V>*>(shared);  // two tiles
  const StepArray<ForwardStep> step{reinterpret_cast<ForwardStep*>(kept + 2 * kTilePacks<T, V, kKept>)};
  const auto tile = [&](const Share<V, kKept>& own, int place) {
    return tile_of(a.x, s, plan, own, kept + place * kTilePacks<T, V, kKept>);
  };
  const auto start = [&](unsigned ticket, int place) {
    if (ticket < plan.tickets) {
      const Share<V, kKept> own(s, plan, ticket, false);
      if (own.first < plan.K) tile(own, place).start(0);
    }
    __pipeline_commit();
  };

  unsigned ticket = share_ticket(take_ticket(plan));
  start(ticket, 0);
  __syncthreads();
  for (int place = 0; ticket < plan.tickets; place ^= 1) {
    const unsigned next_ticket = take_ticket(plan);
    const Share<V, kKept> own(s, plan, ticket, false);
    const auto x = tile(own, place);
    Counts counts(a.mask, s, own);
    const std::int64_t prior = a.count[own.b];
    counts.before = prior + counted(a.mask, s, own.b, 0, own.first_step());
    const float mean_before = a.mean[own.b * s.G + own.group()], center = prior > 0 ? mean_before : 0;
    __pipeline_wait_prior(0);

    // Mean and variance of each step.
    float mean[kRows] = {}, squares[kRows] = {};
    own.for_columns(plan, [&](int offset) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[V];
        x.read(r, offset, v);
#pragma unroll
        for (int j = 0; j < V; ++j) mean[r] += v[j];
      }
    });
    group_sums(mean, plan.lanes);
#pragma unroll
    for (int r = 0; r < kRows; ++r) mean[r] *= plan.scale;
    own.for_columns(plan, [&](int offset) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[V];
        x.read(r, offset, v);
#pragma unroll
        for (int j = 0; j < V; ++j) squares[r] += (v[j] - mean[r]) * (v[j] - mean[r]);
      }
    });
    group_sums(squares, plan.lanes);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int t = own.step(r);
      if (!own.is_first()) break;
      step(t, own.g).distance = counts.has(t) ? mean[r] - center : 0;
      step(t, own.g).rstd = counts.has(t) ? squares[r] * plan.scale : 0;
    }
    ticket = share_ticket(next_ticket);
    start(ticket, place ^ 1);

    // The statistics with each step.
    for (int g = own.warp(); g < own.groups; g += kWarps) {
      const std::int64_t group = std::int64_t{own.first_group} + g, of_state = own.b * s.G + group;
      const int t = own.lane();
      const double of_step = step(t, g).distance;
      Sums sums{of_step, step(t, g).rstd + of_step * of_step};
      const float mean_0 = a.mean[of_state], var_0 = a.var[of_state], from = prior > 0 ? mean_0 : 0;
      const Sums total = scan(sums);
      sums = sum_before(s, plan, own.b, group, own.turn, total) + sums;
      if (prior > 0) sums.q += static_cast<double>(prior) * var_0;
      const std::int64_t n = counts.until(t);
      const Divisor by_n(n);
      const double distance = n > prior ? by_n(sums.s) : mean_0 - from,
                   var = n > prior ? fmax(0.0, by_n(sums.q) - distance * distance) : var_0;
      const float mean = static_cast<float>(from + distance),
                  rstd = reciprocal_root(static_cast<float>(var) + a.eps);
      step(t, g) = {static_cast<float>(distance), rstd, mean,
                    static_cast<float>(mean - (from + distance)) * rstd};
      if (own.turn == plan.tiles - 1 && t == kSteps - 1)
        a.last_mean[of_state] = mean, a.last_var[of_state] = static_cast<float>(var);
      if (own.turn == 0 && t == 0 && a.step_mean != nullptr)
        a.step_mean[own.b * (s.L + 1) * s.G + group] = from;
    }
    __syncthreads();

    own.for_columns(plan, [&](int offset) {
      float weight[V], bias[V];
      load(a.weight + own.column(plan) + offset, weight);
      load(a.bias + own.column(plan) + offset, bias);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!own.has_row(s, r)) break;
        const int t = own.step(r);
        const ForwardStep now = step(t, own.g);
        float y[V] = {};
        if (counts.has(t)) {
          x.read(r, offset, y);
#pragma unroll
          for (int j = 0; j < V; ++j)
            y[j] = fmaf(fmaf(y[j] - now.mean, now.rstd, now.rest), 1 + weight[j], bias[j]);
        }
        store(y, a.y + own.row(s, r) * s.D + own.column(plan) + offset);
        if (a.step_mean == nullptr || !own.is_first() || offset > 0) continue;
        const std::int64_t to = own.row(s, r) * s.G + own.group();
        a.step_mean[to + (own.b + 1) * s.G] = now.distance, a.step_rstd[to] = now.rstd;
      }
    });
  }
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
    kKept ? 4 * kTilePacks<T, V, kKept> * sizeof(Pack<T, V>) : kSumPacks<V> * kThreads * sizeof(SumPack<V>);
static_assert(kRows * sizeof(Bfloat16) >= 2 * sizeof(float));

// With u = x - mean and h = dy (1 + weight), the gradients of a step's statistics are
//   d_mean = -rstd sum(h),   d_var = -rstd^3 sum(h u) / 2,
// and S and Q get (d_mean - 2 (mean - center) d_var)/n and d_var/n from it and from every step after, so that
//   dx = h rstd + (dS + 2 (x - center) dQ) / K.
template <class T, int V, bool kKept>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward(TimestepNormShape s, TimestepNormBackward<T> a, Plan plan, float* parameter_sums) {
  extern __shared__ uint4 shared[];
  auto* const kept = reinterpret_cast<Pack<T, V>*>(shared);  // twice x and dy
  auto* const steps =
      reinterpret_cast<BackwardStep*>(shared + kBackwardTiles<T, V, kKept> / sizeof(uint4));  // also twice
  const auto step_array = [&](int place) {
    return StepArray<BackwardStep>{steps + place * StepArray<BackwardStep>::kPitch * plan.groups};
  };
  const auto tile = [&](const T* of, const Share<V, kKept>& own, int place) {
    return tile_of(of, s, plan, own, kept + place * kTilePacks<T, V, kKept>);
  };
  const auto start = [&](unsigned ticket, int place) {
    if (ticket < plan.tickets) {
      const Share<V, kKept> own(s, plan, ticket, true);
      if (own.first < plan.K) {
        tile(a.x, own, 2 * place).start(0);
        tile(a.dy, own, 2 * place + 1).start(0);
      }
      for (int r = 0; own.is_first() && own.has_row(s, r); ++r) {
        BackwardStep& step = step_array(place)(own.step(r), own.g);
        const std::int64_t from = own.row(s, r) * s.G + own.group();
        __pipeline_memcpy_async(&step.distance, a.step_mean + from + (own.b + 1) * s.G, 4);
        __pipeline_memcpy_async(&step.rstd, a.step_rstd + from, 4);
      }
    }
    __pipeline_commit();
  };

  unsigned ticket = share_ticket(take_ticket(plan));
  start(ticket, 0);
  __syncthreads();
  for (int place = 0; ticket < plan.tickets; place ^= 1) {
    const unsigned next_ticket = take_ticket(plan);
    const Share<V, kKept> own(s, plan, ticket, true);
    const auto x = tile(a.x, own, 2 * place), dy = tile(a.dy, own, 2 * place + 1);
    const auto step = step_array(place);
    Counts counts(a.mask, s, own);
    const std::int64_t last_count = a.last_count[own.b];
    counts.before = last_count - counted(a.mask, s, own.b, own.first_step(), s.L);
    const float center = a.step_mean[own.b * (s.L + 1) * s.G + own.group()];
    float weight[V] = {};
    if (own.first < plan.K) load(a.weight + own.column(plan), weight);
    __pipeline_wait_prior(0);
    __syncwarp();  // the steps came for other lanes

    // The gradients of mean and variance of each step.
    float sum_h[kRows] = {}, sum_hu[kRows] = {};
    own.for_columns(plan, [&](int offset) {
      if (offset > 0) load(a.weight + own.column(plan) + offset, weight);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float mean = center + step(own.step(r), own.g).distance;
        float v[V], d[V];
        x.read(r, offset, v);
        dy.read(r, offset, d);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float h = fmaf(d[j], weight[j], d[j]);
          sum_h[r] += h, sum_hu[r] += h * (v[j] - mean);
        }
      }
    });
    group_sums(sum_h, plan.lanes);
    group_sums(sum_hu, plan.lanes);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int t = own.step(r);
      if (!own.is_first()) break;
      const float rstd = step(t, own.g).rstd;
      step(t, own.g).slope = counts.has(t) ? -0.5f * rstd * rstd * rstd * sum_hu[r] : 0;
      step(t, own.g).constant = counts.has(t) ? -rstd * sum_h[r] : 0;
    }
    ticket = share_ticket(next_ticket);
    start(ticket, place ^ 1);

    for (int g = own.warp(); g < own.groups; g += kWarps) {
      const std::int64_t group = std::int64_t{own.first_group} + g, of_state = own.b * s.G + group;
      const int t = kSteps - 1 - own.lane();
      const bool counts_here = counts.has(t);
      const double distance = step(t, g).distance, d_var = step(t, g).slope, d_mean = step(t, g).constant;
      const double d_last_mean = a.d_last_mean[of_state], d_last_var = a.d_last_var[of_state],
                   last_mean = a.step_mean[((own.b + 1) * (s.L + 1) - 1) * s.G + group];
      Sums sums{0, 0};
      if (counts_here) {
        const Divisor by_n(counts.until(t));
        sums = {by_n(d_mean - 2 * distance * d_var), by_n(d_var)};
      }
      const Sums total = scan(sums);
      sums = sum_before(s, plan, own.b, group, own.turn, total) + sums;
      if (last_count > 0) {
        const Divisor by_n(last_count);
        sums = Sums{by_n(d_last_mean - 2 * last_mean * d_last_var), by_n(d_last_var)} + sums;
      }
      if (counts_here) {
        step(t, g).slope = static_cast<float>(2 * sums.q) * plan.scale;
        step(t, g).constant = static_cast<float>(sums.s + 2 * distance * sums.q) * plan.scale;
      }
      if (own.tile > 0 || t > 0) continue;
      a.d_mean[of_state] = static_cast<float>(last_count > 0 ? counts.before * sums.s : d_last_mean);
      a.d_var[of_state] = static_cast<float>(last_count > 0 ? counts.before * sums.q : d_last_var);
    }
    __syncthreads();

    for (int offset = 0; offset < plan.K; offset += 32 * V) {
      float of_columns[2][V] = {};  // gradients of weight and bias
      if (own.first + offset < plan.K) {
        if (!kKept) load(a.weight + own.column(plan) + offset, weight);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (!own.has_row(s, r)) break;
          const int t = own.step(r);
          const BackwardStep now = step(t, own.g);
          const float mean = center + now.distance;
          float v[V] = {}, d[V];
          if (counts.has(t)) {
            x.read(r, offset, v);
            dy.read(r, offset, d);
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const float u = v[j] - mean, scaled = d[j] * now.rstd;
              of_columns[0][j] += scaled * u, of_columns[1][j] += d[j];
              v[j] = fmaf(scaled, 1 + weight[j], fmaf(now.slope, u, now.constant));
            }
          }
          store(v, a.dx + own.row(s, r) * s.D + own.column(plan) + offset);
        }
      }
      __syncthreads();
      constexpr int P = kSumsOfPack<V>;
      auto* const partial = reinterpret_cast<SumPack<V>*>(kept + 2 * place * kTilePacks<T, V, kKept>);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int j = 0; j < V; ++j)
          partial[(k * V + j) / P * kThreads + threadIdx.x].value[j % P] = of_columns[k][j];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kSumPacks<V> * 32; i += kThreads) {
        const int pack = i / 32, lane = i % 32, g = lane / plan.lanes, k = pack * P / V;
        const int column = lane % plan.lanes * V + offset + pack * P % V;
        if (g >= own.groups || column >= plan.K) continue;
        float sums[P] = {};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const SumPack<V> of_warp = partial[pack * kThreads + w * 32 + lane];
#pragma unroll
          for (int p = 0; p < P; ++p) sums[p] += of_warp.value[p];
        }
        const std::int64_t of_tile = std::int64_t{own.b} * plan.tiles + own.tile;
        store(sums, parameter_sums + (of_tile * 2 + k) * s.D + (std::int64_t{own.first_group} + g) * plan.K +
                        column);
      }
    }
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
        const std::size_t shared =
            2 * kTilePacks<T, V, kKept> * sizeof(Pack<T, V>) + step_bytes<ForwardStep>(plan);
        allow_shared_memory(forward<T, V, kKept>, shared);
        forward<T, V, kKept><<<plan.blocks(kForwardBlocks), kThreads, shared, stream>>>(s, a, plan);
      },
      a.x, a.weight, a.bias, a.y);
}

template <class T>
void timestep_norm_backward(const TimestepNormShape& s, const TimestepNormBackward<T>& a, void* work,
                            float* sums, cudaStream_t stream) {
  with_plan<T>(
      s, work, stream,
      [&]<int V, bool kKept>(const Plan& plan) {
        const std::size_t shared = kBackwardTiles<T, V, kKept> + 2 * step_bytes<BackwardStep>(plan);
        allow_shared_memory(backward<T, V, kKept>, shared);
        backward<T, V, kKept><<<plan.blocks(kBackwardBlocks), kThreads, shared, stream>>>(s, a, plan, sums);
      },
      a.x, a.weight, a.dy, a.dx);
}

template void timestep_norm_forward(const TimestepNormShape&, const TimestepNormForward<float>&, void*,
                                    cudaStream_t);
template void timestep_norm_forward(const TimestepNormShape&, const TimestepNormForward<Bfloat16>&, void*,
                                    cudaStream_t);
template void timestep_norm_backward(const TimestepNormShape&, const TimestepNormBackward<float>&, void*,
                                     float*, cudaStream_t);
template void timestep_norm_backward(const TimestepNormShape&, const TimestepNormBackward<Bfloat16>&, void*,
                                     float*, cudaStream_t);

}  // namespace megalodon::ops::cuda
