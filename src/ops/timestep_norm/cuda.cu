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
// One kernel each way, a block a tile: kSteps steps of as many groups as a warp reads at once. It reads its
// tile once, sums over the features, waits for the sums of the tiles before it, and writes the result.
namespace megalodon::ops::cuda {
namespace {

constexpr int kSteps = kTimestepNormTile, kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = kSteps / kWarps;  // of a thread: steps `warp`, `warp` + kWarps, ...
constexpr int kBatch = 4;               // rows that are summed side by side
constexpr int kChunk = 32;              // tiles
static_assert(kSteps == 64 && kRows % kBatch == 0);

struct Sums {
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
  return s.B * (tiles + ceil_div(tiles, kChunk)) * s.G;
}

// How the groups lie in blocks, and memory for what blocks tell each other, which starts as all ones.
struct Plan {
  int K, lanes, groups;  // lanes of a group; groups of a warp, which are those of a block
  float scale;           // 1/K
  int slices, tiles;     // blocks across the groups and along the steps of a sequence
  unsigned* ticket;      // the last that was taken
  Sums* totals;          // [B, tiles + chunks, G]

  // V features a lane.
  Plan(const TimestepNormShape& s, int V, void* work)
      : K(static_cast<int>(s.D / s.G)),
        lanes(1),
        scale(1 / static_cast<float>(K)),
        ticket(static_cast<unsigned*>(work)),
        totals(static_cast<Sums*>(work) + 1) {
    while (lanes * V < K && lanes < 32) lanes *= 2;
    groups = 32 / lanes;
    slices = static_cast<int>(ceil_div(s.G, groups)), tiles = static_cast<int>(count_tiles(s));
  }
  unsigned blocks(const TimestepNormShape& s) const { return grid_size(s.B * slices * tiles); }
};

// Where a block stands. Blocks take their turns by tickets, not by their index: those before it have begun.
struct Place {
  std::int64_t b, first_group;
  int turn, groups;  // the turn among the tiles of a sequence

  __device__ Place(const TimestepNormShape& s, const Plan& plan) {
    __shared__ unsigned ticket;
    if (threadIdx.x == 0) ticket = atomicAdd(plan.ticket, 1) + 1;
    __syncthreads();
    const unsigned chains = static_cast<unsigned>(s.B) * plan.slices, chain = ticket % chains;
    turn = static_cast<int>(ticket / chains);
    b = chain / plan.slices;
    first_group = std::int64_t{chain % plan.slices} * plan.groups;
    groups = static_cast<int>(min(s.G - first_group, std::int64_t{plan.groups}));
  }
};

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

// The steps of a tile.
struct Steps {
  std::int64_t first_row;  // of [B, L]
  int size;
  std::uint64_t counts;  // bit t: step t is there and not padded
  std::int64_t before;   // counted steps before the tile, earlier calls' too

  __device__ Steps(const std::uint8_t* mask, const TimestepNormShape& s, std::int64_t b, std::int64_t first)
      : first_row(b * s.L + first), size(static_cast<int>(min(s.L - first, std::int64_t{kSteps}))) {
    const auto there = [&](int t) { return t < size && (mask == nullptr || mask[first_row + t] == 0); };
    const int lane = threadIdx.x % 32;
    counts = __ballot_sync(~0u, there(lane)) | std::uint64_t{__ballot_sync(~0u, there(lane + 32))} << 32;
  }
  __device__ bool count(int t) const { return (counts >> t & 1) != 0; }
  __device__ std::int64_t counted_until(int t) const {  // with t
    return before + __popcll(counts & (~std::uint64_t{0} >> (kSteps - 1 - t)));
  }
};

// Numbers of each step and group of a block, in shared memory.
struct StepArray {
  float* data;
  static constexpr int kPitch = kSteps + 1;
  __device__ float& operator()(int t, int g) const { return data[g * kPitch + t]; }
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

template <bool kKept>
constexpr int kTilePacks = kKept ? kRows * kThreads : 0;  // of a block
template <class T, int V, bool kKept>
using StepTile = Tile<T, V, kRows, kKept>;

// A thread's share of a block's tile: V columns of the rows, and those 32 V further on where a group is
// wider.
template <int V, bool kKept>
struct Columns {
  int warp, lane, g, rows;
  int K, first, passes;              // `first` and offsets of a group's features
  std::int64_t group, first_column;  // of all groups; of all features

  __device__ Columns(const TimestepNormShape& s, const Plan& plan, const Place& at, int steps)
      : warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(lane / plan.lanes),
        rows((steps - warp + kWarps - 1) / kWarps),
        K(plan.K),
        first(lane % plan.lanes * V),
        passes(kKept ? 1 : (K + 32 * V - 1) / (32 * V)),
        group(at.first_group + min(g, at.groups - 1)),
        first_column(group * K + first) {
    if (g >= at.groups) first = K;  // none
  }
  __device__ int offset(int pass) const { return pass * 32 * V; }
  __device__ bool has(int pass) const { return first + offset(pass) < K; }
};

// Each becomes its sum over `lanes` neighbouring lanes.
__device__ void group_sums(float (&x)[kBatch], int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) x[i] += __shfl_xor_sync(~0u, x[i], offset);
  }
}

// Prefix sums of a warp's 64 numbers, two a lane, each with itself. Returns the sum of all.
__device__ Sums scan(Sums (&x)[2]) {
  const int lane = threadIdx.x % 32;
  Sums sum = x[0] + x[1];
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Sums before{__shfl_up_sync(~0u, sum.s, offset), __shfl_up_sync(~0u, sum.q, offset)};
    if (lane >= offset) sum = before + sum;
  }
  const Sums before{__shfl_up_sync(~0u, sum.s, 1), __shfl_up_sync(~0u, sum.q, 1)};
  if (lane > 0) x[0] = before + x[0];
  x[1] = x[0] + x[1];
  return {__shfl_sync(~0u, sum.s, 31), __shfl_sync(~0u, sum.q, 31)};
}

// All ones is a NaN that no sum becomes: a number tells by itself that it is there.
__device__ void publish(Sums sums, Sums* to) {
  volatile Sums* const place = to;
  place->s = isnan(sums.s) ? CUDART_NAN : sums.s;
  place->q = isnan(sums.q) ? CUDART_NAN : sums.q;
}
__device__ Sums await(const Sums* from) {
  const volatile Sums* const place = from;
  Sums sums;
  do {
    sums.s = place->s, sums.q = place->q;
  } while (__double_as_longlong(sums.s) == -1 || __double_as_longlong(sums.q) == -1);
  return sums;
}

// The sum of the tiles that had their turn before in the sequence, whose own is `own`; for the warp of a
// group. Always added up in the same order: the chunks before, and within the chunk a tile a lane.
__device__ Sums sum_before(const TimestepNormShape& s, const Plan& plan, const Place& at, std::int64_t group,
                           Sums own) {
  const int lane = threadIdx.x % 32, chunk = at.turn / kChunk, place = at.turn % kChunk;
  const int chunks = (plan.tiles + kChunk - 1) / kChunk;
  Sums* const totals = plan.totals + at.b * (plan.tiles + chunks) * s.G + group;
  const auto of_tile = [&](std::int64_t turn) { return totals + turn * s.G; };
  const auto of_chunk = [&](std::int64_t i) { return totals + (plan.tiles + i) * s.G; };
  if (lane == 0) publish(own, of_tile(at.turn));
  Sums sum{0, 0};
  if (lane < place) sum = await(of_tile(at.turn - place + lane));
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    sum = sum + Sums{__shfl_xor_sync(~0u, sum.s, offset), __shfl_xor_sync(~0u, sum.q, offset)};
  if (chunk > 0) sum = await(of_chunk(chunk - 1)) + sum;
  if (place == kChunk - 1 && lane == 0) publish(sum + own, of_chunk(chunk));
  return sum;
}

template <class T, int V, bool kKept>
__global__ void __launch_bounds__(kThreads, 4)
    forward(TimestepNormShape s, TimestepNormForward<T> a, Plan plan) {
  extern __shared__ uint4 shared[];
  const Place at(s, plan);
  const std::int64_t first_step = std::int64_t{at.turn} * kSteps;
  Steps steps(a.mask, s, at.b, first_step);
  const Columns<V, kKept> own(s, plan, at, steps.size);
  const std::int64_t here = (steps.first_row + own.warp) * s.D + own.first_column, pitch = kWarps * s.D;
  const StepTile<T, V, kKept> x{a.x + here, pitch, own.rows, reinterpret_cast<Pack<T, V>*>(shared)};
  if (own.has(0)) x.start(0);
  __pipeline_commit();
  steps.before = counted(a.mask, s, at.b, 0, first_step);
  const std::int64_t prior = a.count[at.b];
  steps.before += prior;
  const float center = prior > 0 ? a.mean[at.b * s.G + own.group] : 0;
  float* const arrays = reinterpret_cast<float*>(x.kept + kTilePacks<kKept>);
  const int size = plan.groups * StepArray::kPitch;
  // The mean less the center; y = ((x - mean) rstd + rest) (1 + weight) + bias, mean rounded and rest the
  // rounding.
  const StepArray distances{arrays}, means{arrays + size}, rests{arrays + 2 * size}, rstds{arrays + 3 * size};
  __pipeline_wait_prior(0);

  // Mean and variance of each step.
#pragma unroll 1
  for (int first = 0; first < kRows; first += kBatch) {
    float v[V], mean[kBatch] = {}, squares[kBatch] = {};
    for (int pass = 0; pass < own.passes; ++pass) {
      if (!own.has(pass)) break;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        x.read(first + i, own.offset(pass), v);
#pragma unroll
        for (int j = 0; j < V; ++j) mean[i] += v[j];
      }
    }
    group_sums(mean, plan.lanes);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) mean[i] *= plan.scale;
    for (int pass = 0; pass < own.passes; ++pass) {
      if (!own.has(pass)) break;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        x.read(first + i, own.offset(pass), v);
#pragma unroll
        for (int j = 0; j < V; ++j) squares[i] += (v[j] - mean[i]) * (v[j] - mean[i]);
      }
    }
    group_sums(squares, plan.lanes);
    if (own.lane % plan.lanes != 0) continue;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int t = (first + i) * kWarps + own.warp;
      distances(t, own.g) = steps.count(t) ? mean[i] - center : 0;
      rstds(t, own.g) = steps.count(t) ? squares[i] * plan.scale : 0;  // variances until they are scanned
    }
  }
  __syncthreads();

  // The statistics with each step.
  for (int g = own.warp; g < at.groups; g += kWarps) {
    const std::int64_t group = at.first_group + g, of_state = at.b * s.G + group;
    Sums sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const double distance = distances(2 * own.lane + i, g);
      sums[i] = {distance, rstds(2 * own.lane + i, g) + distance * distance};
    }
    const float mean_0 = a.mean[of_state], var_0 = a.var[of_state], from = prior > 0 ? mean_0 : 0;
    Sums before = sum_before(s, plan, at, group, scan(sums));
    if (prior > 0) before.q += static_cast<double>(prior) * var_0;
    double distance, var;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * own.lane + i;
      const std::int64_t n = steps.counted_until(t);
      const Divisor by_n(n);
      distance = n > prior ? by_n(before.s + sums[i].s) : mean_0 - from;
      var = n > prior ? fmax(0.0, by_n(before.q + sums[i].q) - distance * distance) : var_0;
      const float mean = static_cast<float>(from + distance),
                  rstd = reciprocal_root(static_cast<float>(var) + a.eps);
      distances(t, g) = static_cast<float>(distance);
      means(t, g) = mean;
      rests(t, g) = static_cast<float>(mean - (from + distance)) * rstd;
      rstds(t, g) = rstd;
    }
    if (at.turn == plan.tiles - 1 && own.lane == 31) {
      a.last_mean[of_state] = static_cast<float>(from + distance);
      a.last_var[of_state] = static_cast<float>(var);
    }
    if (at.turn == 0 && own.lane == 0 && a.step_mean != nullptr)
      a.step_mean[at.b * (s.L + 1) * s.G + group] = from;
  }
  __syncthreads();

  for (int i = threadIdx.x; a.step_mean != nullptr && i < steps.size * at.groups; i += kThreads) {
    const int t = i / at.groups, g = i % at.groups;
    const std::int64_t to = (steps.first_row + t) * s.G + at.first_group + g;
    a.step_mean[to + (at.b + 1) * s.G] = distances(t, g), a.step_rstd[to] = rstds(t, g);
  }
  for (int pass = 0; pass < own.passes; ++pass) {
    if (!own.has(pass)) continue;
    const int offset = own.offset(pass);
    float weight[V], bias[V];
    load(a.weight + own.first_column + offset, weight);
    load(a.bias + own.first_column + offset, bias);
#pragma unroll
    for (int j = 0; j < V; ++j) weight[j] += 1;
#pragma unroll 4
    for (int r = 0; r < own.rows; ++r) {
      const int t = r * kWarps + own.warp;
      const float mean = means(t, own.g), rest = rests(t, own.g), rstd = rstds(t, own.g);
      float v[V] = {};
      if (steps.count(t)) {
        x.read(r, offset, v);
#pragma unroll
        for (int j = 0; j < V; ++j) v[j] = fmaf(fmaf(v[j] - mean, rstd, rest), weight[j], bias[j]);
      }
      store(v, a.y + here + r * pitch + offset);
    }
  }
}

// A warp's sums over its rows for the gradients of weight and bias; the pitch is for a warp that reads them
// in the order of the columns.
template <int V>
struct WarpSums {
  float of[2][V][36];
};
// What x and dy take in shared memory, and those sums afterwards.
template <class T, int V, bool kKept>
constexpr std::size_t kBackwardTiles =
    kKept ? 2 * kTilePacks<kKept> * sizeof(Pack<T, V>) : kWarps * sizeof(WarpSums<V>);

// With u = x - mean and h = dy (1 + weight), the gradients of a step's statistics are
//   d_mean = -rstd sum(h),   d_var = -rstd^3 sum(h u) / 2,
// and S and Q get (d_mean - 2 (mean - center) d_var)/n and d_var/n from it and from every step after, so that
//   dx = h rstd + (dS + 2 (x - center) dQ) / K.
template <class T, int V, bool kKept>
__global__ void __launch_bounds__(kThreads, 3)
    backward(TimestepNormShape s, TimestepNormBackward<T> a, Plan plan, float* parameter_sums) {
  extern __shared__ uint4 shared[];
  const Place at(s, plan);
  const std::int64_t tile = plan.tiles - 1 - at.turn, first_step = tile * kSteps;
  Steps steps(a.mask, s, at.b, first_step);
  const Columns<V, kKept> own(s, plan, at, steps.size);
  const std::int64_t here = (steps.first_row + own.warp) * s.D + own.first_column, pitch = kWarps * s.D;
  auto* const kept = reinterpret_cast<Pack<T, V>*>(shared);
  const StepTile<T, V, kKept> x{a.x + here, pitch, own.rows, kept},
      dy{a.dy + here, pitch, own.rows, kept + kTilePacks<kKept>};
  if (own.has(0)) x.start(0), dy.start(0);
  __pipeline_commit();
  steps.before = a.last_count[at.b] - counted(a.mask, s, at.b, first_step, s.L);
  float* const arrays = reinterpret_cast<float*>(shared) + kBackwardTiles<T, V, kKept> / sizeof(float);
  const int size = plan.groups * StepArray::kPitch;
  const StepArray distances{arrays}, rstds{arrays + size}, slopes{arrays + 2 * size},
      offsets{arrays + 3 * size};
  for (int i = threadIdx.x; i < steps.size * at.groups; i += kThreads) {
    const int t = i / at.groups, g = i % at.groups;
    const std::int64_t from = (steps.first_row + t) * s.G + at.first_group + g;
    distances(t, g) = a.step_mean[from + (at.b + 1) * s.G], rstds(t, g) = a.step_rstd[from];
  }
  const float center = a.step_mean[at.b * (s.L + 1) * s.G + own.group];
  __pipeline_wait_prior(0);
  __syncthreads();

  // The gradients of mean and variance of each step, where the offsets and slopes will be.
#pragma unroll 1
  for (int first = 0; first < kRows; first += kBatch) {
    float sum_h[kBatch] = {}, sum_hu[kBatch] = {};
    for (int pass = 0; pass < own.passes; ++pass) {
      if (!own.has(pass)) break;
      float weight[V];
      load(a.weight + own.first_column + own.offset(pass), weight);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int r = first + i;
        const float mean = center + distances(r * kWarps + own.warp, own.g);
        float v[V], d[V];
        x.read(r, own.offset(pass), v);
        dy.read(r, own.offset(pass), d);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float h = fmaf(d[j], weight[j], d[j]);
          sum_h[i] += h, sum_hu[i] += h * (v[j] - mean);
        }
      }
    }
    group_sums(sum_h, plan.lanes);
    group_sums(sum_hu, plan.lanes);
    if (own.lane % plan.lanes != 0) continue;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int t = (first + i) * kWarps + own.warp;
      const float r = rstds(t, own.g);
      offsets(t, own.g) = steps.count(t) ? -r * sum_h[i] : 0;
      slopes(t, own.g) = steps.count(t) ? -0.5f * r * r * r * sum_hu[i] : 0;
    }
  }
  __syncthreads();

  for (int g = own.warp; g < at.groups; g += kWarps) {
    const std::int64_t group = at.first_group + g, of_state = at.b * s.G + group;
    Sums sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = kSteps - 1 - (2 * own.lane + i);
      sums[i] = {0, 0};
      if (!steps.count(t)) continue;
      const Divisor by_n(steps.counted_until(t));
      const double d_var = slopes(t, g);
      sums[i] = {by_n(offsets(t, g) - 2.0 * distances(t, g) * d_var), by_n(d_var)};
    }
    const std::int64_t n = a.last_count[at.b];
    const double d_last_mean = a.d_last_mean[of_state], d_last_var = a.d_last_var[of_state],
                 last_mean = a.step_mean[((at.b + 1) * (s.L + 1) - 1) * s.G + group];
    Sums before = sum_before(s, plan, at, group, scan(sums));
    const Divisor by_n(n);
    if (n > 0) before = Sums{by_n(d_last_mean - 2 * last_mean * d_last_var), by_n(d_last_var)} + before;
    const Divisor by_K(own.K);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = kSteps - 1 - (2 * own.lane + i);
      sums[i] = before + sums[i];
      if (!steps.count(t)) continue;
      offsets(t, g) = static_cast<float>(by_K(sums[i].s + 2.0 * distances(t, g) * sums[i].q));
      slopes(t, g) = static_cast<float>(by_K(2 * sums[i].q));
    }
    if (tile > 0 || own.lane < 31) continue;
    a.d_mean[of_state] = static_cast<float>(n > 0 ? steps.before * sums[1].s : d_last_mean);
    a.d_var[of_state] = static_cast<float>(n > 0 ? steps.before * sums[1].q : d_last_var);
  }
  __syncthreads();

  for (int pass = 0; pass < own.passes; ++pass) {
    const int offset = own.offset(pass);
    float weight[V] = {}, of_columns[2][V] = {};  // gradients of weight and bias
    if (own.has(pass)) load(a.weight + own.first_column + offset, weight);
#pragma unroll 2
    for (int r = 0; r < (own.has(pass) ? own.rows : 0); ++r) {
      const int t = r * kWarps + own.warp;
      const float mean = center + distances(t, own.g), rstd = rstds(t, own.g), slope = slopes(t, own.g),
                  constant = offsets(t, own.g);
      float v[V] = {}, d[V];
      if (steps.count(t)) {
        x.read(r, offset, v);
        dy.read(r, offset, d);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float u = v[j] - mean, scaled = d[j] * rstd;
          of_columns[0][j] += scaled * u, of_columns[1][j] += d[j];
          v[j] = fmaf(scaled, 1 + weight[j], fmaf(slope, u, constant));
        }
      }
      store(v, a.dx + here + r * pitch + offset);
    }
    // The block's sums, in what was the tile.
    __syncthreads();
    auto* const partial = reinterpret_cast<WarpSums<V>*>(shared);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j) partial[own.warp].of[k][j][own.lane] = of_columns[k][j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * 32 * V; i += kThreads) {
      const int k = i / (32 * V), lane = i / V % 32, j = i % V, g = lane / plan.lanes;
      const int column = lane % plan.lanes * V + offset + j;
      if (g >= at.groups || column >= own.K) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w].of[k][j][lane];
      parameter_sums[((at.b * plan.tiles + tile) * 2 + k) * s.D + (at.first_group + g) * own.K + column] =
          sum;
    }
    __syncthreads();
  }
}

// launch.operator()<V, kKept>(plan, bytes of the StepArrays of a block for each of them) where all is ready.
template <class T, class F, class... P>
void with_plan(const TimestepNormShape& s, void* work, cudaStream_t stream, F&& launch,
               const P*... pointers) {
  cudaMemsetAsync(work, 0xff, timestep_norm_work(s), stream);
  with_pack_width<T>(
      s.D / s.G,
      [&]<int V>(Width<V>) {
        const Plan plan(s, V, work);
        const std::size_t array = sizeof(float) * StepArray::kPitch * plan.groups;
        if (plan.K <= 32 * V) {
          launch.template operator()<V, true>(plan, array);
        } else {
          launch.template operator()<V, false>(plan, array);
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
      [&]<int V, bool kKept>(const Plan& plan, std::size_t array) {
        const std::size_t shared = kTilePacks<kKept> * sizeof(Pack<T, V>) + 4 * array;
        allow_shared_memory(forward<T, V, kKept>, shared);
        forward<T, V, kKept><<<plan.blocks(s), kThreads, shared, stream>>>(s, a, plan);
      },
      a.x, a.weight, a.bias, a.y);
}

template <class T>
void timestep_norm_backward(const TimestepNormShape& s, const TimestepNormBackward<T>& a, void* work,
                            float* sums, cudaStream_t stream) {
  with_plan<T>(
      s, work, stream,
      [&]<int V, bool kKept>(const Plan& plan, std::size_t array) {
        const std::size_t shared = kBackwardTiles<T, V, kKept> + 4 * array;
        allow_shared_memory(backward<T, V, kKept>, shared);
        backward<T, V, kKept><<<plan.blocks(s), kThreads, shared, stream>>>(s, a, plan, sums);
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
