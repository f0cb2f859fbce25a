#include "ops/timestep_norm/cuda.h"

#include <algorithm>
#include <array>

#include "ops/timestep_norm/cuda_chains.h"

// Shapes: B batch, L steps, D features, G groups, K = D/G features of a group.
//
// With S and Q the sums of u/K and u^2/K, u = x - center, over the features of a group and all n counted
// steps so far, mean = center + S/n and var = Q/n - (S/n)^2. So both passes are prefix sums of two numbers in
// float64: forward of S and Q over the steps, backward of their gradients, from the last step on. The center
// is the mean before the first step, 0 where nothing was counted: with much counted, means hardly differ from
// it.
//
// One kernel each way, see cuda_chains.h.
namespace megalodon::ops::cuda {
namespace {
using namespace chains;

constexpr int kBlocks = 2;  // of a multiprocessor
template <int kRows_, int kWarpBits_>
struct Shape {
  static constexpr int kRows = kRows_;          // of a thread in a tile
  static constexpr int kWarpBits = kWarpBits_;  // log2 of the warps of a block
  static constexpr int kWarps = 1 << kWarpBits, kThreads = 32 * kWarps;
};
using ForwardShape = Shape<8, 3>;
// Backward, where a chain has groups side by side, whose sums more warps share, and elsewhere.
using SharedShape = Shape<4, 3>;
using OwnShape = Shape<8, 2>;

// Of a step and group: of its features alone, then the sums of the tile's steps until it, with it.
union StepSums {
  struct Moments {
    float first, distance, variance;  // mean = first + distance
  } moments;
  struct Products {
    float h, hu;  // sums of h and h (x - mean), h = dy (1 + weight)
  } products;
  Sums sums;
};
// y = ((x - mean) rstd + rest) (1 + weight) + bias: mean is center + distance rounded, rest the rounding.
struct Normal {
  float mean, rstd, rest;
};
// dx = h rstd + slope (x - mean) + constant
struct alignas(8) KnownStep {
  float distance, rstd;
};
struct alignas(8) Line {
  float slope, constant;
};

template <class T, int V, bool kKept>
constexpr int kForwardPacks = kKept ? ForwardShape::kRows * 32 : 0;  // of a tile

template <class T, int V, bool kKept>
std::size_t forward_bytes(const Plan& plan) {
  return ForwardShape::kWarps * (kStages * kForwardPacks<T, V, kKept> * sizeof(Pack<T, V>) +
                                 (sizeof(StepSums) + sizeof(Normal)) * count_steps(plan)) +
         Chain::bytes(plan);
}

template <class T, int V, bool kKept>
__global__ void __launch_bounds__(ForwardShape::kThreads, kBlocks)
    forward(TimestepNormShape s, TimestepNormForward<T> a, std::int64_t* last_count, Plan plan) {
  extern __shared__ uint4 shared[];
  constexpr int kRows = ForwardShape::kRows;
  constexpr int kPacks = kForwardPacks<T, V, kKept>;
  const Place<V, kKept> at(s, plan);
  auto* const packs = reinterpret_cast<Pack<T, V>*>(shared);
  const Chain chain(plan, at.unit, packs + ForwardShape::kWarps * kStages * kPacks);
  auto* const step_sums = static_cast<StepSums*>(chain.end());
  const int steps_of_tile = count_steps(plan);
  const StepArray sums_of(step_sums + at.warp() * steps_of_tile, plan);
  const StepArray normal_of(
      reinterpret_cast<Normal*>(step_sums + ForwardShape::kWarps * steps_of_tile) + at.warp() * steps_of_tile,
      plan);
  const Features<T, V, kRows, kKept> x(a.x, s, plan, at, packs + at.warp() * kStages * kPacks);
  const auto tile_of = [&](int round) { return Tile(plan, at.unit, round, false); };
  const auto place_of = [&](int round) { return round % kStages * kPacks; };

  wait_for_previous();
  const std::int64_t prior = a.count[at.b];
  for (int g = at.lane(); g < at.groups; g += 32) {
    const std::int64_t of_state = at.b * s.G + at.first_group + g;
    chain.before[g] = {{0, prior > 0 ? static_cast<double>(prior) * a.var[of_state] : 0},
                       prior > 0 ? a.mean[of_state] : 0};
  }
  float weight[V] = {}, bias[V] = {};
  const auto load_parameters = [&](int offset) {
    load(a.weight + at.column(plan) + offset, weight);
    load(a.bias + at.column(plan) + offset, bias);
#pragma unroll
    for (int j = 0; j < V; ++j) weight[j] += 1;
  };
  if (kKept && at.first < plan.K) load_parameters(0);

  const std::int64_t of_chain = at.b * s.G + at.first_group;
  float* const step_mean = a.step_mean + of_chain * (s.L + 1);
  float* const step_rstd = a.step_rstd + of_chain * s.L;
  std::int64_t counted_steps = prior, counted_until = 0;
  Counts coming, now;  // of the tile that was summed up last, and the one before
  // The statistics of a row and group alone: of the lane's row, about its first feature, which is as near as
  // any; or of all rows of the tile, about the mean.
  const bool is_narrow = kKept && plan.is_narrow();
  const auto row_moments = [&](int place, int g) {
    const auto* const row = x.row(place, at.lane());
    const int swizzle = at.lane() % 8, of_group = g << plan.lane_bits;
    const float first = to_float(row[of_group ^ swizzle].value[0]);
    float sums[2] = {}, squares[2] = {};
#pragma unroll 4
    for (int k = 0; k * V < plan.K; ++k) {
      float v[V];
      unpack(row[(of_group + k) ^ swizzle], v);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float u = v[j] - first;
        sums[j % 2] += u, squares[j % 2] = fmaf(u, u, squares[j % 2]);
      }
    }
    const float distance = (sums[0] + sums[1]) * plan.scale;
    return StepSums::Moments{first, distance,
                             fmaxf(fmaf(-distance, distance, (squares[0] + squares[1]) * plan.scale), 0)};
  };
  const auto sum_rows = [&](const Tile& tile, int place) {
    float mean[kRows] = {}, squares[kRows] = {};
    at.for_columns(plan, [&](int offset) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[V];
        unpack(x.read(at, tile, place, r, offset), v);
#pragma unroll
        for (int j = 0; j < V; ++j) mean[r] += v[j];
      }
    });
    group_sums(mean, plan.lanes());
#pragma unroll
    for (int r = 0; r < kRows; ++r) mean[r] *= plan.scale;
    at.for_columns(plan, [&](int offset) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[V];
        unpack(x.read(at, tile, place, r, offset), v);
#pragma unroll
        for (int j = 0; j < V; ++j) squares[r] += (v[j] - mean[r]) * (v[j] - mean[r]);
      }
    });
    group_sums(squares, plan.lanes());
    if (at.is_first()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        sums_of(at.step(r), at.g).moments = {mean[r], 0, squares[r] * plan.scale};
    }
    __syncwarp();
  };
  // The sums over the tile's features, and over its steps.
  const auto sum_up = [&](int round) {
    const Tile tile = tile_of(round);
    __syncwarp();  // what other lanes brought
    if (tile.steps > 0) {
      counted_steps += counted(a.mask, s, at.b, counted_until, tile.first_step);
      counted_until = tile.first_step;
      if (!is_narrow) sum_rows(tile, place_of(round));
    }
    coming = Counts(a.mask, s, at.b, tile, counted_steps);
    for (int g = 0; g < at.groups; ++g) {
      Sums sums{0, 0};
      if (coming.has(at.lane())) {
        const auto own = is_narrow ? row_moments(place_of(round), g) : sums_of(at.lane(), g).moments;
        const double distance = static_cast<double>(own.first) - chain.before[g].center + own.distance;
        sums = {distance, own.variance + distance * distance};
      }
      sums = scan(sums);
      chain.tell(round, g, sums);
      if (at.lane() < plan.steps) sums_of(at.lane(), g).sums = sums;
    }
  };
  // The statistics with each step.
  const auto settle = [&](int round) {
    const Tile tile = tile_of(round);
    now = coming;
    if (tile.steps == 0) return;
    const int t = at.lane();
    for (int g = 0; g < at.groups; ++g) {
      const std::int64_t group = at.first_group + g, of_state = at.b * s.G + group;
      const Sums before = chain.until(round, g);
      if (t >= plan.steps) continue;
      const Sums sums = before + sums_of(t, g).sums;
      const float from = chain.before[g].center;
      const std::int64_t n = now.until(t);
      const Divisor by_n(n);
      double distance = by_n(sums.s), var = by_n(sums.q) - distance * distance;
      if (var < 0) var = 0;
      if (n == prior) distance = a.mean[of_state] - from, var = a.var[of_state];  // nothing counted yet
      const float mean = static_cast<float>(from + distance),
                  rstd = reciprocal_root(static_cast<float>(var) + a.eps);
      normal_of(t, g) = {mean, rstd, static_cast<float>(mean - (from + distance)) * rstd};
      if (a.step_mean != nullptr && t < tile.steps) {
        float* const to = step_mean + g * (s.L + 1) + tile.first_step;
        to[1 + t] = static_cast<float>(distance);
        step_rstd[g * s.L + tile.first_step + t] = rstd;
        if (tile.index == 0 && t == 0) to[0] = from;
      }
      if (tile.index == plan.tiles - 1 && t == plan.steps - 1) {
        a.last_mean[of_state] = mean, a.last_var[of_state] = static_cast<float>(var);
        if (group == 0) last_count[at.b] = n;
      }
    }
  };
  const auto write = [&](int round) {
    const Tile tile = tile_of(round);
    if (tile.steps == 0) return;
    with_all(now.are_all(plan.steps), [&]<bool kAll>() {
      at.for_columns(plan, [&](int offset) {
        if constexpr (!kKept) load_parameters(offset);
        T* to = a.y + (x.first - a.x) + tile.first_step * s.D + offset;
#pragma unroll
        for (int r = 0; r < kRows; ++r, to += at.row_step * s.D) {
          const Normal with_step = normal_of(at.step(r), at.g);
          float y[V];
          unpack(x.read(at, tile, place_of(round), r, offset), y);
#pragma unroll
          for (int j = 0; j < V; ++j)
            y[j] = fmaf(fmaf(y[j] - with_step.mean, with_step.rstd, with_step.rest), weight[j], bias[j]);
          if (kAll || now.has(at.step(r))) store(y, to);
        }
      });
    });
    if (a.mask != nullptr) clear_padding(s, plan, at, tile, now, a.y);
    __syncwarp();  // the steps have been read
  };
  go_through_tiles(plan, settle, sum_up, write,
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

template <class B, bool kKept>
constexpr int kBackwardPacks = kKept ? B::kRows * 32 : 0;  // of a tile, of x or dy

template <class B, class T, int V, bool kKept>
std::size_t backward_bytes(const Plan& plan) {
  return B::kWarps * (kStages * 2 * kBackwardPacks<B, kKept> * sizeof(Pack<T, V>) +
                      (sizeof(StepSums) + kStages * sizeof(KnownStep) + sizeof(Line)) * count_steps(plan)) +
         Chain::bytes(plan) + sizeof(float) * 8 * V;
}

// With u = x - mean and h = dy (1 + weight), the gradients of a step's statistics are
//   d_mean = -rstd sum(h),   d_var = -rstd^3 sum(h u) / 2,
// and S and Q get (d_mean - 2 (mean - center) d_var)/n and d_var/n from it and from every step after, so that
//   dx = h rstd + (dS + 2 (x - center) dQ) / K.
// These two of a step, n with it.
__device__ Sums gradient_sums(const KnownStep& now, const StepSums::Products& of, std::int64_t n) {
  const double distance = now.distance;
  const float d_mean = -now.rstd * of.h, d_var = -0.5f * now.rstd * now.rstd * now.rstd * of.hu;
  const Divisor by_n(n);
  return {by_n(d_mean - 2 * distance * d_var), by_n(d_var)};
}

template <class B, class T, int V, bool kKept>
__global__ void __launch_bounds__(B::kThreads, kBlocks)
    backward(TimestepNormShape s, TimestepNormBackward<T> a, TimestepNormAdded<T> added, Plan plan,
             float* parameter_sums) {
  extern __shared__ uint4 shared[];
  constexpr int kRows = B::kRows;
  constexpr int kPacks = kBackwardPacks<B, kKept>;
  const Place<V, kKept> at(s, plan);
  auto* const packs = reinterpret_cast<Pack<T, V>*>(shared);
  const Chain chain(plan, at.unit, packs + B::kWarps * kStages * 2 * kPacks);
  auto* const weights = static_cast<float*>(chain.end());  // with 1, of the chain
  auto* const step_sums = reinterpret_cast<StepSums*>(weights + 8 * V);
  const int steps_of_tile = count_steps(plan);
  auto* const known_steps = reinterpret_cast<KnownStep*>(step_sums + B::kWarps * steps_of_tile);
  auto* const lines = reinterpret_cast<Line*>(known_steps + B::kWarps * kStages * steps_of_tile);
  const StepArray sums_of(step_sums + at.warp() * steps_of_tile, plan);
  const StepArray line_of(lines + at.warp() * steps_of_tile, plan);
  auto* const own = packs + at.warp() * kStages * 2 * kPacks;
  const Features<T, V, kRows, kKept> x(a.x, s, plan, at, own), dy(a.dy, s, plan, at, own + kPacks);
  const auto tile_of = [&](int round) { return Tile(plan, at.unit, round, true); };
  const auto place_of = [&](int round) { return round % kStages * 2 * kPacks; };
  const auto known_steps_of = [&](int round) {
    return StepArray(known_steps + (at.warp() * kStages + round % kStages) * steps_of_tile, plan);
  };
  // The lane's step of a tile, the last first; further lanes may help with its row.
  const int t = plan.steps - 1 - at.lane() % plan.steps;
  const bool is_own = at.lane() < plan.steps, is_narrow = kKept && plan.is_narrow();

  wait_for_previous();
  const std::int64_t last_count = a.last_count[at.b];
  const float center = a.step_mean[(at.b * s.G + at.group()) * (s.L + 1)];  // of the lane's columns
  const auto of_last = [](const float* d, std::int64_t of_state) { return d == nullptr ? 0 : d[of_state]; };
  for (int g = at.lane(); g < at.groups; g += 32) {
    const std::int64_t of_state = at.b * s.G + at.first_group + g;
    const float* const means = a.step_mean + of_state * (s.L + 1);
    const double d_mean = of_last(a.d_last_mean, of_state), d_var = of_last(a.d_last_var, of_state),
                 last_mean = means[s.L];
    const Divisor by_n(last_count);
    chain.before[g] = {last_count > 0 ? Sums{by_n(d_mean - 2 * last_mean * d_var), by_n(d_var)} : Sums{0, 0},
                       means[0]};
  }
  if (is_narrow) {
    for (int i = static_cast<int>(threadIdx.x); i < at.groups * plan.K; i += B::kThreads)
      weights[i] = 1 + a.weight[at.first_group * plan.K + i];
    __syncthreads();
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
    fetch_added<T, V, kRows>(added.first, first, s, plan, at, tile);
    fetch_added<T, V, kRows>(added.second, first, s, plan, at, tile);
    if (at.lane() >= tile.steps) return;
    const StepArray<KnownStep> known = known_steps_of(round);
    for (int g = 0; g < at.groups; ++g) {
      const std::int64_t of_state = at.b * s.G + at.first_group + g, from = tile.first_step + at.lane();
      KnownStep& to = known(at.lane(), g);
      __pipeline_memcpy_async(&to.distance, a.step_mean + of_state * (s.L + 1) + 1 + from, 4);
      __pipeline_memcpy_async(&to.rstd, a.step_rstd + of_state * s.L + from, 4);
    }
  };

  std::int64_t counted_steps = last_count, counted_from = s.L;
  Counts coming, now;  // of the tile that was summed up last, and the one before
  // The sums of h and h u of a row and group: of the lane's row, or of all rows of the tile.
  const auto sum_row = [&](int place, int g, float distance) {
    const float mean = chain.before[g].center + distance;
    const auto *const row = x.row(place, t), *const dy_row = dy.row(place, t);
    float sum_h = 0, sum_hu = 0;
#pragma unroll 2
    for (int k = at.lane() / plan.steps; k * V < plan.K; k += 32 / plan.steps) {
      const int i = ((g << plan.lane_bits) + k) ^ t % 8;
      float v[V], d[V], weight[V];
      unpack(row[i], v);
      unpack(dy_row[i], d);
      load(weights + g * plan.K + k * V, weight);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float h = d[j] * weight[j];
        sum_h += h, sum_hu = fmaf(h, v[j] - mean, sum_hu);
      }
    }
    for (int lanes = plan.steps; lanes < 32; lanes *= 2)
      sum_h += __shfl_xor_sync(~0u, sum_h, lanes), sum_hu += __shfl_xor_sync(~0u, sum_hu, lanes);
    return StepSums::Products{sum_h, sum_hu};
  };
  const auto sum_rows = [&](const Tile& tile, int place, const StepArray<KnownStep>& known) {
    float sum_h[kRows] = {}, sum_hu[kRows] = {};
    at.for_columns(plan, [&](int offset) {
      if constexpr (!kKept) load_weight(offset);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float mean = center + known(at.step(r), at.g).distance;
        float v[V], d[V];
        unpack(x.read(at, tile, place, r, offset), v);
        unpack(dy.read(at, tile, place, r, offset), d);
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
      for (int r = 0; r < kRows; ++r) sums_of(at.step(r), at.g).products = {sum_h[r], sum_hu[r]};
    }
    __syncwarp();
  };
  // The sums over the tile's features, the gradients of mean and variance of each step, and their sums.
  const auto sum_up = [&](int round) {
    const Tile tile = tile_of(round);
    const StepArray<KnownStep> known = known_steps_of(round);
    __syncwarp();  // what other lanes brought
    if (tile.steps > 0) {
      counted_steps -= counted(a.mask, s, at.b, tile.first_step, counted_from);
      counted_from = tile.first_step;
      if (!is_narrow) sum_rows(tile, place_of(round), known);
    }
    coming = Counts(a.mask, s, at.b, tile, counted_steps);
    for (int g = 0; g < at.groups; ++g) {
      const KnownStep own = known(t, g);
      const auto products = is_narrow ? sum_row(place_of(round), g, own.distance)
                            : is_own  ? sums_of(t, g).products
                                      : StepSums::Products{0, 0};
      const bool counts = is_own && coming.has(t);
      const Sums sums = scan(counts ? gradient_sums(own, products, coming.until(t)) : Sums{0, 0});
      chain.tell(round, g, sums);
      if (is_own) sums_of(t, g).sums = sums;
    }
  };
  // What comes from the tiles after it.
  const auto settle = [&](int round) {
    const Tile tile = tile_of(round);
    now = coming;
    if (tile.steps == 0) return;
    const StepArray<KnownStep> known = known_steps_of(round);
    for (int g = 0; g < at.groups; ++g) {
      const std::int64_t of_state = at.b * s.G + at.first_group + g;
      const Sums after = chain.until(round, g);
      if (!is_own) continue;
      const Sums sums = after + sums_of(t, g).sums;
      const double distance = known(t, g).distance;
      line_of(t, g) = {static_cast<float>(2 * sums.q) * plan.scale,
                       static_cast<float>(sums.s + 2 * distance * sums.q) * plan.scale};
      if (tile.first_step + t > 0) continue;
      const auto of_prior = [&](double sum, float d_last) {
        return last_count > 0 ? static_cast<float>(static_cast<double>(now.before) * sum) : d_last;
      };
      a.d_mean[of_state] = of_prior(sums.s, of_last(a.d_last_mean, of_state));
      a.d_var[of_state] = of_prior(sums.q, of_last(a.d_last_var, of_state));
    }
  };
  // dx, and the gradients of weight and bias.
  const auto write = [&](int round) {
    const Tile tile = tile_of(round);
    if (tile.steps == 0) return;
    const StepArray<KnownStep> known = known_steps_of(round);
    with_all(now.are_all(plan.steps), [&]<bool kAll>() {
      at.for_columns(plan, [&](int offset) {
        if constexpr (!kKept) {
          load_weight(offset);
          load(to_sums + offset, of_columns[0]);
          load(to_sums + s.D + offset, of_columns[1]);
        }
        T* to = a.dx + (x.first - a.x) + tile.first_step * s.D + offset;
#pragma unroll
        for (int r = 0; r < kRows; ++r, to += at.row_step * s.D) {
          const auto [distance, rstd] = known(at.step(r), at.g);
          const auto [slope, constant] = line_of(at.step(r), at.g);
          const float mean = center + distance;
          if (!kAll && !now.has(at.step(r))) continue;
          float v[V], d[V];
          unpack(x.read(at, tile, place_of(round), r, offset), v);
          unpack(dy.read(at, tile, place_of(round), r, offset), d);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const float u = v[j] - mean, scaled = d[j] * rstd;
            of_columns[0][j] = fmaf(scaled, u, of_columns[0][j]), of_columns[1][j] += d[j];
            v[j] = fmaf(scaled, weight[j], fmaf(slope, u, constant));
          }
          add_to(v, added.first, to - a.dx);
          add_to(v, added.second, to - a.dx);
          store(v, to);
        }
        if constexpr (!kKept)
          store(of_columns[0], to_sums + offset), store(of_columns[1], to_sums + s.D + offset);
      });
    });
    if (a.mask != nullptr) clear_padding(s, plan, at, tile, now, a.dx);
    __syncwarp();  // the steps have been read
  };
  go_through_tiles(plan, settle, sum_up, write, start);

  if constexpr (kKept) {
    for (int lanes = 1 << plan.row_bits; lanes < 32; lanes *= 2) {  // over the warp's rows
#pragma unroll
      for (int j = 0; j < V; ++j) {
        of_columns[0][j] += __shfl_xor_sync(~0u, of_columns[0][j], lanes);
        of_columns[1][j] += __shfl_xor_sync(~0u, of_columns[1][j], lanes);
      }
    }
    if (at.row == 0 && at.first < plan.K) store(of_columns[0], to_sums), store(of_columns[1], to_sums + s.D);
  }
}

std::int64_t cluster_blocks(const TimestepNormShape& s, int warps);

// launch.operator()<V, kKept>(plan), the plan for blocks of shape B
template <class B, class T, class F, class... P>
void with_plan(const TimestepNormShape& s, F&& launch, const P*... pointers) {
  with_pack_width<T>(
      s.D / s.G,
      [&]<int V>(Width<V>) {
        const auto blocks = static_cast<int>(cluster_blocks(s, B::kWarps));
        const Plan plan(s, V, B::kRows, blocks, B::kWarpBits);
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
  return {dim3(grid_size(s.B * plan.slices), 1, blocks), 32u << plan.warp_bits, shared, stream, blocks};
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
  constexpr std::size_t kShared = 224 * 1024 / kBlocks;
  const auto kernel = backward<SharedShape, Bfloat16, 8, true>;
  allow_all_shared_memory(kernel, kShared);
  MostClusters most{};
  for (unsigned blocks = 2; is_hopper() && blocks < most.size(); ++blocks) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1, 1, blocks};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1, 1, blocks), config.blockDim = dim3(SharedShape::kThreads);
    config.dynamicSmemBytes = kShared;
    config.attrs = &attribute, config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&most[blocks], kernel, &config) != cudaSuccess) most[blocks] = 0;
  }
  cudaGetLastError();  // a size that the device does not know is none
  return most;
}

template <class F>
auto with_backward_shape(const TimestepNormShape& s, F&& f) {
  constexpr std::int64_t kShared = 32;  // features of a group that may share a chain
  return s.D / s.G <= kShared ? f(SharedShape{}) : f(OwnShape{});
}

// The largest clusters that all run at once, each warp with some tiles to go through.
std::int64_t cluster_blocks(const TimestepNormShape& s, int warps) {
  constexpr std::int64_t kFeatures = 64, kSteps = 64;  // of a chain; of a warp at least
  static const MostClusters most = most_clusters();
  const std::int64_t groups = std::max(kFeatures * s.G / s.D, std::int64_t{1}),
                     chains = s.B * ceil_div(s.G, groups);
  std::int64_t blocks = 1;
  for (std::int64_t n = 2; n < static_cast<std::int64_t>(most.size()); ++n) {
    if (chains <= most[static_cast<std::size_t>(n)] && n * warps * kSteps <= s.L) blocks = n;
  }
  return blocks;
}

}  // namespace

std::int64_t timestep_norm_units(const TimestepNormShape& s) {
  return with_backward_shape(s, [&]<class B>(B) { return cluster_blocks(s, B::kWarps) * B::kWarps; });
}

template <class T>
void timestep_norm_forward(const TimestepNormShape& s, const TimestepNormForward<T>& a,
                           std::int64_t* last_count, cudaStream_t stream) {
  with_plan<ForwardShape, T>(
      s,
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
  with_backward_shape(s, [&]<class B>(B) {
    with_plan<B, T>(
        s,
        [&]<int V, bool kKept>(const Plan& plan) {
          const std::size_t shared = backward_bytes<B, T, V, kKept>(plan);
          allow_all_shared_memory(backward<B, T, V, kKept>, shared);
          launch_step(clusters(s, plan, shared, stream), backward<B, T, V, kKept>, s, a, added, plan, sums);
        },
        a.x, a.weight, a.dy, a.dx, added.first, added.second);
  });
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
