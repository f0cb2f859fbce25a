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
template <int kRows_, int kWarpBits_, int kFeatures_>
struct Shape {
  static constexpr int kRows = kRows_;          // of a thread in a tile
  static constexpr int kWarpBits = kWarpBits_;  // log2 of the warps of a block
  static constexpr int kWarps = 1 << kWarpBits, kThreads = 32 * kWarps;
  static constexpr int kSteps = 4 * kRows;      // of a tile, at most
  static constexpr int kFeatures = kFeatures_;  // of a group whose lanes are those of a row or fewer, at most
};
// Packs of V of those.
template <class Shape, int V>
constexpr int kMostPacks = Shape::kFeatures < 8 * V ? Shape::kFeatures / V : 8;
using ForwardShape = Shape<8, 3, 64>;
template <int kFeatures>
using BackwardShape = Shape<8, 2, kFeatures>;
constexpr int kBackwardWarps = BackwardShape<64>::kWarps;

// Of a step and group, forward: y = ((x - mean) rstd + rest) (1 + weight) + bias. Mean is center + distance
// rounded, rest the rounding.
struct Moments {  // of its features alone: mean = first + distance
  float first, distance, variance;
};
struct Normal {
  float mean, rstd, rest;
};
union ForwardStep {
  Moments moments;
  Normal normal;
};
struct ForwardGroup {
  Before before;
  Sums sums[ForwardShape::kSteps];  // of the tile's steps until each, with it
  ForwardStep steps[ForwardShape::kSteps];
};
// Backward: dx = h rstd + slope (x - mean) + constant, h = dy (1 + weight).
struct alignas(8) KnownStep {
  float distance, rstd;
};
struct Products {  // the sums of h and h (x - mean) over its features
  float h, hu;
};
struct alignas(16) Line {
  float mean, rstd, slope, constant;
};
union BackwardStep {
  Products products;
  Line line;
};
template <int kSteps>
struct BackwardGroup {
  Before before;
  Sums sums[kSteps];  // of the tile's steps from each on, with it
  BackwardStep steps[kSteps];
  KnownStep known[kStages][kSteps];
};

template <Extent kExtent>
constexpr bool kInShared = kExtent != Extent::kMore;
template <Extent kExtent>
constexpr int kForwardPacks = kInShared<kExtent> ? ForwardShape::kRows * 32 : 0;  // of a tile

template <class T, int V, Extent kExtent>
std::size_t forward_bytes(const Plan& plan) {
  return ForwardShape::kWarps *
             (kStages * kForwardPacks<kExtent> * sizeof(Pack<T, V>) + sizeof(ForwardGroup) * plan.groups) +
         Chain::bytes(plan);
}

template <class T, int V, Extent kExtent>
__global__ void __launch_bounds__(ForwardShape::kThreads, kBlocks)
    forward(TimestepNormShape s, TimestepNormForward<T> a, std::int64_t* last_count, Plan given) {
  extern __shared__ uint4 shared[];
  constexpr int kRows = ForwardShape::kRows;
  constexpr bool kKept = kInShared<kExtent>, kNarrow = kExtent == Extent::kRow;
  constexpr int kPacks = kForwardPacks<kExtent>;
  const Plan plan = known<ForwardShape, kExtent>(given);
  const Place<V, kKept> at(s, plan);
  auto* const packs = reinterpret_cast<Pack<T, V>*>(shared);
  auto* const all_groups = reinterpret_cast<ForwardGroup*>(packs + ForwardShape::kWarps * kStages * kPacks);
  ForwardGroup* const groups = all_groups + at.warp() * plan.groups;  // of the warp
  const Chain chain(plan, at.unit, all_groups + ForwardShape::kWarps * plan.groups);
  const Features<T, V, kRows, kKept> x(a.x, s, plan, at, packs + at.warp() * kStages * kPacks);
  const auto place_of = [&](const Tile& tile) { return tile.stage * kPacks; };
  const auto start = [&](const Tile& tile) { x.start(plan, at, tile, place_of(tile)); };

  wait_for_previous();
  start_tiles(plan, at.unit, false, start);
  const std::int64_t prior = a.count[at.b];
  for (int g = at.lane(); g < at.groups; g += 32) {
    const std::int64_t of_state = at.b * s.G + at.first_group + g;
    groups[g].before = {{0, prior > 0 ? static_cast<double>(prior) * a.var[of_state] : 0},
                        prior > 0 ? a.mean[of_state] : 0};
    chain.start(g);
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
  std::int64_t counted_steps = prior;
  int counted_until = 0;
  Counts coming{}, now{};  // of the tile that was summed up last, and the one before
  // The statistics of a row and group alone: of the lane's row, about its first feature, which is as near as
  // any; or of all rows of the tile, about the mean.
  const auto row_moments = [&](const Tile& tile, int g) {
    constexpr int kMost = kMostPacks<ForwardShape, V>;
    const int slot = x.group_slot(place_of(tile), at.lane(), g << plan.lane_bits);
    const float first = to_float(x.warp[slot].value[0]);
    float sums[2] = {}, squares[2] = {};
    with_all(plan.K == kMost * V, [&]<bool kAll>() {
#pragma unroll
      for (int k = 0; k < kMost; ++k) {
        if (!kAll && k * V >= plan.K) break;
        float v[V];
        unpack(x.warp[slot ^ k], v);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float u = v[j] - first;
          sums[j % 2] += u, squares[j % 2] = fmaf(u, u, squares[j % 2]);
        }
      }
    });
    const float distance = (sums[0] + sums[1]) * plan.scale;
    return Moments{first, distance,
                   fmaxf(fmaf(-distance, distance, (squares[0] + squares[1]) * plan.scale), 0)};
  };
  const auto sum_rows = [&](const Tile& tile) {
    float mean[kRows] = {}, squares[kRows] = {};
    at.for_columns(plan, [&](int offset) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[V];
        unpack(x.read(at, tile, place_of(tile), r, offset), v);
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
        unpack(x.read(at, tile, place_of(tile), r, offset), v);
#pragma unroll
        for (int j = 0; j < V; ++j) squares[r] += (v[j] - mean[r]) * (v[j] - mean[r]);
      }
    });
    group_sums(squares, plan.lanes());
    if (at.is_first()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        groups[at.g].steps[at.step(r)].moments = {mean[r], 0, squares[r] * plan.scale};
    }
    __syncwarp();
  };
  // The statistics with step t of a tile, given the sums until it.
  const auto settle = [&](const Tile& tile, int t, int g, const Sums& sums) {
    const std::int64_t of_state = of_chain + g;
    const float from = groups[g].before.center;
    const std::int64_t n = now.until(t);
    const Divisor by_n(n);
    double distance = by_n(sums.s), var = by_n(sums.q) - distance * distance;
    if (var < 0) var = 0;
    if (n == prior) distance = a.mean[of_state] - from, var = a.var[of_state];  // nothing counted yet
    const float mean = static_cast<float>(from + distance),
                rstd = reciprocal_root(static_cast<float>(var) + a.eps);
    groups[g].steps[t].normal = {mean, rstd, static_cast<float>(mean - (from + distance)) * rstd};
    if (a.step_mean != nullptr && t < tile.steps) {
      float* const to = step_mean + g * (s.L + 1) + tile.first_step;
      to[1 + t] = static_cast<float>(distance);
      step_rstd[g * s.L + tile.first_step + t] = rstd;
      if (tile.index == 0 && t == 0) to[0] = from;
    }
    if (tile.index == plan.tiles - 1 && t == plan.steps - 1) {
      a.last_mean[of_state] = mean, a.last_var[of_state] = static_cast<float>(var);
      if (at.first_group + g == 0) last_count[at.b] = n;
    }
  };
  const auto advance = [&](const Tile& before, const Tile& tile) {
    wait_for_tile();
    now = coming;
    if (tile.steps > 0) {
      counted_steps += counted(a.mask, s, at.b, counted_until, tile.first_step);
      counted_until = tile.first_step;
      if (!kNarrow) sum_rows(tile);
    }
    coming = Counts(a.mask, s, at.b, tile, counted_steps);
    const int t = at.lane();
    for (int g = 0; g < at.groups; ++g) {
      ForwardGroup& group = groups[g];
      Sums others{0, 0}, own{0, 0};
      if (before.steps > 0) others = chain.others(before.stage, g, t, 32);
      if (coming.has(t)) {
        const auto of = kNarrow ? row_moments(tile, g) : group.steps[t].moments;
        const double distance = static_cast<double>(of.first) - group.before.center + of.distance;
        own = {distance, of.variance + distance * distance};
      }
      scan(own, others, 32);
      others = group.before.more(others, t == 0);
      if (t == 31) chain.tell(tile.stage, g, own);
      if (t >= plan.steps) continue;
      if (before.steps > 0) settle(before, t, g, others + group.sums[t]);
      group.sums[t] = own;
    }
    __syncwarp();
  };
  const auto write = [&](const Tile& tile) {
    with_all(now.are_all(plan.steps), [&]<bool kAll>() {
      at.for_columns(plan, [&](int offset) {
        if constexpr (!kKept) load_parameters(offset);
        T* to = a.y + x.start_of(at, tile) + offset;
#pragma unroll
        for (int r = 0; r < kRows; ++r, to += x.pitch(at)) {
          const Normal normal = groups[at.g].steps[at.step(r)].normal;
          float y[V];
          unpack(x.read(at, tile, place_of(tile), r, offset), y);
#pragma unroll
          for (int j = 0; j < V; ++j)
            y[j] = fmaf(fmaf(y[j] - normal.mean, normal.rstd, normal.rest), weight[j], bias[j]);
          if (kAll || now.has(at.step(r))) store(y, to);
        }
      });
    });
    if (a.mask != nullptr) clear_padding(s, plan, at, tile, now, a.y);
    __syncwarp();  // the steps have been read
  };
  go_through_tiles(plan, at.unit, false, advance, write, start);
}

template <class B, Extent kExtent>
constexpr int kBackwardPacks = kInShared<kExtent> ? B::kRows * 32 : 0;  // of a tile, of x or dy

template <class B, class T, int V, Extent kExtent>
std::size_t backward_bytes(const Plan& plan) {
  return B::kWarps * (kStages * 2 * kBackwardPacks<B, kExtent> * sizeof(Pack<T, V>) +
                      sizeof(BackwardGroup<B::kSteps>) * plan.groups) +
         Chain::bytes(plan) + sizeof(float) * 8 * V;
}

// With u = x - mean and h = dy (1 + weight), the gradients of a step's statistics are
//   d_mean = -rstd sum(h),   d_var = -rstd^3 sum(h u) / 2,
// and S and Q get (d_mean - 2 (mean - center) d_var)/n and d_var/n from it and from every step after, so that
//   dx = h rstd + (dS + 2 (x - center) dQ) / K.
// These two of a step, n with it.
__device__ Sums gradient_sums(const KnownStep& now, const Products& of, std::int64_t n) {
  const double distance = now.distance;
  const float d_mean = -now.rstd * of.h, d_var = -0.5f * now.rstd * now.rstd * now.rstd * of.hu;
  const Divisor by_n(n);
  return {by_n(d_mean - 2 * distance * d_var), by_n(d_var)};
}

template <class B, class T, int V, Extent kExtent, int kAdded>
__global__ void __launch_bounds__(B::kThreads, kBlocks)
    backward(TimestepNormShape s, TimestepNormBackward<T> a, TimestepNormAdded<T> added, Plan given,
             float* parameter_sums) {
  extern __shared__ uint4 shared[];
  constexpr int kRows = B::kRows;
  constexpr bool kKept = kInShared<kExtent>, kNarrow = kExtent == Extent::kRow;
  constexpr int kPacks = kBackwardPacks<B, kExtent>;
  const Plan plan = known<B, kExtent>(given);
  const Place<V, kKept> at(s, plan);
  auto* const packs = reinterpret_cast<Pack<T, V>*>(shared);
  auto* const weights = reinterpret_cast<float*>(packs + B::kWarps * kStages * 2 * kPacks);  // with 1
  using Group = BackwardGroup<B::kSteps>;
  auto* const all_groups = reinterpret_cast<Group*>(weights + 8 * V);
  Group* const groups = all_groups + at.warp() * plan.groups;  // of the warp
  const Chain chain(plan, at.unit, all_groups + B::kWarps * plan.groups);
  auto* const own = packs + at.warp() * kStages * 2 * kPacks;
  const Features<T, V, kRows, kKept> x(a.x, s, plan, at, own), dy(a.dy, s, plan, at, own + kPacks);
  const auto place_of = [&](const Tile& tile) { return tile.stage * 2 * kPacks; };
  // The lane's step of a tile, the last first, and its group of those that a warp takes at once.
  const int t = plan.steps - 1 - at.lane() % plan.steps, lane_g = at.lane() / plan.steps,
            groups_at_once = 32 / plan.steps;
  const std::int64_t lane_state = at.b * s.G + at.first_group + lane_g;
  const float* const lane_mean = a.step_mean + lane_state * (s.L + 1) + 1 + t;
  const float* const lane_rstd = a.step_rstd + lane_state * s.L + t;
  const T* const to_add[] = {added.first, added.second};

  // What is added to a tile, into the second cache.
  const auto fetch = [&](const T* added, const Tile& tile) {
    at.for_columns(plan, [&](int offset) {
      const T* from = added + x.start_of(at, tile) + offset;
      for (int r = 0; r < kRows; ++r, from += x.pitch(at)) {
        if (at.step(r) < tile.steps) prefetch(from);
      }
    });
  };
  const auto start = [&](const Tile& tile) {
    x.start(plan, at, tile, place_of(tile));
    dy.start(plan, at, tile, place_of(tile));
#pragma unroll
    for (int n = 0; n < kAdded; ++n) fetch(to_add[n], tile);
#pragma unroll 1
    for (int first = 0; first < at.groups; first += groups_at_once) {
      const int g = first + lane_g;
      if (t >= tile.steps || g >= at.groups) continue;
      KnownStep& to = groups[g].known[tile.stage][t];
      __pipeline_memcpy_async(&to.distance, lane_mean + first * (s.L + 1) + tile.first_step, 4);
      __pipeline_memcpy_async(&to.rstd, lane_rstd + first * s.L + tile.first_step, 4);
    }
  };

  wait_for_previous();
  start_tiles(plan, at.unit, true, start);
  const std::int64_t last_count = a.last_count[at.b];
  const float center = a.step_mean[(at.b * s.G + at.group()) * (s.L + 1)];  // of the lane's columns
  const auto of_last = [](const float* d, std::int64_t of_state) { return d == nullptr ? 0 : d[of_state]; };
  for (int g = at.lane(); g < at.groups; g += 32) {
    const std::int64_t of_state = at.b * s.G + at.first_group + g;
    const float* const means = a.step_mean + of_state * (s.L + 1);
    const double d_mean = of_last(a.d_last_mean, of_state), d_var = of_last(a.d_last_var, of_state),
                 last_mean = means[s.L];
    const Divisor by_n(last_count);
    groups[g].before = {last_count > 0 ? Sums{by_n(d_mean - 2 * last_mean * d_var), by_n(d_var)} : Sums{0, 0},
                        means[0]};
    chain.start(g);
  }
  if constexpr (kNarrow) {
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

  std::int64_t counted_steps = last_count;
  int counted_from = static_cast<int>(s.L);
  Counts coming{}, now{};  // of the tile that was summed up last, and the one before
  // The sums of h and h (x - mean) of a row and group: of the lane's row, or of all rows of the tile.
  const auto row_products = [&](const Tile& tile, int g, float mean) {
    constexpr int kMost = kMostPacks<B, V>;
    const int slot = x.group_slot(place_of(tile), t, g << plan.lane_bits);
    const float* const of_group = weights + g * plan.K;
    Products sum{0, 0};
    with_all(plan.K == kMost * V, [&]<bool kAll>() {
#pragma unroll
      for (int k = 0; k < kMost; ++k) {
        if (!kAll && k * V >= plan.K) break;
        float v[V], d[V], weight[V];
        unpack(x.warp[slot ^ k], v);
        unpack(dy.warp[slot ^ k], d);
        load(of_group + k * V, weight);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float h = d[j] * weight[j];
          sum.h += h, sum.hu = fmaf(h, v[j] - mean, sum.hu);
        }
      }
    });
    return sum;
  };
  const auto sum_rows = [&](const Tile& tile) {
    float sum_h[kRows] = {}, sum_hu[kRows] = {};
    at.for_columns(plan, [&](int offset) {
      if constexpr (!kKept) load_weight(offset);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float mean = center + groups[at.g].known[tile.stage][at.step(r)].distance;
        float v[V], d[V];
        unpack(x.read(at, tile, place_of(tile), r, offset), v);
        unpack(dy.read(at, tile, place_of(tile), r, offset), d);
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
      for (int r = 0; r < kRows; ++r) groups[at.g].steps[at.step(r)].products = {sum_h[r], sum_hu[r]};
    }
    __syncwarp();
  };
  // What dx takes from step t of a tile, given the sums from it on.
  const auto settle = [&](const Tile& tile, int g, const Sums& sums) {
    const KnownStep known = groups[g].known[tile.stage][t];
    const double distance = known.distance;
    groups[g].steps[t].line = {groups[g].before.center + known.distance, known.rstd,
                               static_cast<float>(2 * sums.q) * plan.scale,
                               static_cast<float>(sums.s + 2 * distance * sums.q) * plan.scale};
    if (tile.first_step + t > 0) return;
    const std::int64_t of_state = at.b * s.G + at.first_group + g;
    const auto of_prior = [&](double sum, float d_last) {
      return last_count > 0 ? static_cast<float>(static_cast<double>(counted_steps) * sum) : d_last;
    };
    a.d_mean[of_state] = of_prior(sums.s, of_last(a.d_last_mean, of_state));
    a.d_var[of_state] = of_prior(sums.q, of_last(a.d_last_var, of_state));
  };
  // The gradients of mean and variance of each step of a tile, summed over the steps.
  const auto advance = [&](const Tile& before, const Tile& tile) {
    wait_for_tile();
    now = coming;
    if (tile.steps > 0) {
      counted_steps -= counted(a.mask, s, at.b, tile.first_step, counted_from);
      counted_from = tile.first_step;
      if (!kNarrow) sum_rows(tile);
    }
    coming = Counts(a.mask, s, at.b, tile, counted_steps);
#pragma unroll 1
    for (int first = 0; first < at.groups; first += groups_at_once) {
      const bool is_own = first + lane_g < at.groups;
      const int g = min(first + lane_g, at.groups - 1), i = at.lane() % plan.steps;
      Group& group = groups[g];
      Sums others{0, 0}, own{0, 0};
      if (before.steps > 0) others = chain.others(before.stage, g, i, plan.steps);
      if (is_own && coming.has(t)) {
        const KnownStep known = group.known[tile.stage][t];
        const Products of =
            kNarrow ? row_products(tile, g, group.before.center + known.distance) : group.steps[t].products;
        own = gradient_sums(known, of, coming.until(t));
      }
      scan(own, others, plan.steps);
      others = group.before.more(others, is_own && i == 0);
      if (!is_own) continue;
      if (i == plan.steps - 1) chain.tell(tile.stage, g, own);
      if (before.steps > 0) settle(before, g, others + group.sums[t]);
      group.sums[t] = own;
    }
    __syncwarp();
  };
  // dx, and the gradients of weight and bias.
  const auto write = [&](const Tile& tile) {
    with_all(now.are_all(plan.steps), [&]<bool kAll>() {
      at.for_columns(plan, [&](int offset) {
        if constexpr (!kKept) {
          load_weight(offset);
          load(to_sums + offset, of_columns[0]);
          load(to_sums + s.D + offset, of_columns[1]);
        }
        const auto for_rows = [&](auto&& f) {
          std::int64_t i = x.start_of(at, tile) + offset;
#pragma unroll
          for (int r = 0; r < kRows; ++r, i += x.pitch(at)) {
            if (kAll || now.has(at.step(r))) f(r, i);
          }
        };
        Pack<T, V> more[kAdded + 1][kRows];  // all of it on its way at once
#pragma unroll
        for (int n = 0; n < kAdded; ++n)
          for_rows([&](int r, std::int64_t i) { more[n][r] = load_pack<V>(to_add[n] + i); });
        for_rows([&](int r, std::int64_t i) {
          const Line line = groups[at.g].steps[at.step(r)].line;
          float v[V], d[V];
          unpack(x.read(at, tile, place_of(tile), r, offset), v);
          unpack(dy.read(at, tile, place_of(tile), r, offset), d);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const float u = v[j] - line.mean, scaled = d[j] * line.rstd;
            of_columns[0][j] = fmaf(scaled, u, of_columns[0][j]), of_columns[1][j] += d[j];
            v[j] = fmaf(scaled, weight[j], fmaf(line.slope, u, line.constant));
          }
#pragma unroll
          for (int n = 0; n < kAdded; ++n) {
            unpack(more[n][r], d);
#pragma unroll
            for (int j = 0; j < V; ++j) v[j] += d[j];
          }
          store(v, a.dx + i);
        });
        if constexpr (!kKept)
          store(of_columns[0], to_sums + offset), store(of_columns[1], to_sums + s.D + offset);
      });
    });
    if (a.mask != nullptr) clear_padding(s, plan, at, tile, now, a.dx);
    __syncwarp();  // the steps have been read
  };
  go_through_tiles(plan, at.unit, true, advance, write, start);

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

// launch.operator()<V, extent>(plan), the plan for blocks of shape B
template <class B, class T, class F, class... P>
void with_plan(const TimestepNormShape& s, F&& launch, const P*... pointers) {
  with_pack_width<T>(
      s.D / s.G,
      [&]<int V>(Width<V>) {
        const auto blocks = static_cast<int>(cluster_blocks(s, B::kWarps));
        const Plan plan(s, V, B::kRows, blocks, B::kWarpBits);
        switch (plan.extent(V)) {
          case Extent::kRow:
            return launch.template operator()<V, Extent::kRow>(plan);
          case Extent::kWarp:
            return launch.template operator()<V, Extent::kWarp>(plan);
          case Extent::kMore:
            return launch.template operator()<V, Extent::kMore>(plan);
        }
      },
      pointers...);
}

StepLaunch clusters(const TimestepNormShape& s, const Plan& plan, std::size_t shared, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(plan.blocks);
  return {dim3(grid_size(s.B * plan.slices), 1, blocks), 32u << plan.warp_bits, shared, stream, blocks};
}

// Clusters of 0, 1, ... blocks that run at once, kBlocks on a multiprocessor.
using MostClusters = std::array<int, 9>;
MostClusters most_clusters() {
  constexpr std::size_t kShared = 224 * 1024 / kBlocks;
  const auto kernel = backward<BackwardShape<64>, Bfloat16, 8, Extent::kRow, 0>;
  allow_all_shared_memory(kernel, kShared);
  MostClusters most{};
  for (unsigned blocks = 2; is_hopper() && blocks < most.size(); ++blocks) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1, 1, blocks};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1, 1, blocks), config.blockDim = dim3(32 * kBackwardWarps);
    config.dynamicSmemBytes = kShared;
    config.attrs = &attribute, config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&most[blocks], kernel, &config) != cudaSuccess) most[blocks] = 0;
  }
  cudaGetLastError();  // a size that the device does not know is none
  return most;
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
  return cluster_blocks(s, kBackwardWarps) * kBackwardWarps;
}

template <class T>
void timestep_norm_forward(const TimestepNormShape& s, const TimestepNormForward<T>& a,
                           std::int64_t* last_count, cudaStream_t stream) {
  with_plan<ForwardShape, T>(
      s,
      [&]<int V, Extent kExtent>(const Plan& plan) {
        const std::size_t shared = forward_bytes<T, V, kExtent>(plan);
        allow_all_shared_memory(forward<T, V, kExtent>, shared);
        launch_step(clusters(s, plan, shared, stream), forward<T, V, kExtent>, s, a, last_count, plan);
      },
      a.x, a.weight, a.bias, a.y);
}

template <class T>
void timestep_norm_backward(const TimestepNormShape& s, const TimestepNormBackward<T>& a,
                            const TimestepNormAdded<T>& added, float* sums, cudaStream_t stream) {
  with_plan<BackwardShape<64>, T>(
      s,
      [&]<int V, Extent kExtent>(const Plan& plan) {
        const auto launch = [&](auto kernel) {
          const std::size_t shared = backward_bytes<BackwardShape<64>, T, V, kExtent>(plan);
          allow_all_shared_memory(kernel, shared);
          launch_step(clusters(s, plan, shared, stream), kernel, s, a, added, plan, sums);
        };
        const auto launch_of = [&]<class B>(B) {
          added.first == nullptr    ? launch(backward<B, T, V, kExtent, 0>)
          : added.second == nullptr ? launch(backward<B, T, V, kExtent, 1>)
                                    : launch(backward<B, T, V, kExtent, 2>);
        };
        if constexpr (kExtent == Extent::kRow) {
          if (plan.K <= 32) return launch_of(BackwardShape<32>{});
        }
        launch_of(BackwardShape<64>{});
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
