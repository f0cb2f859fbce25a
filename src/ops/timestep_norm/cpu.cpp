#include "ops/timestep_norm/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/timestep_norm/cpu.cpp"
#include <hwy/foreach_target.h>

#include <algorithm>

#include "base/parallel.h"
#include "ops/column_sums.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

// Shapes: B batch, L steps, D features, G groups, K = D/G features of a group. A tile is a run of groups of
// one sequence; its steps go by one after the other, so that x is read and y written once, in memory order.

#ifndef MEGALODON_OPS_TIMESTEP_NORM_TILE_
#define MEGALODON_OPS_TIMESTEP_NORM_TILE_
namespace megalodon::ops::cpu {
constexpr std::int64_t kTileGroups = 64;
struct TimestepNormTile {
  std::int64_t b, first, groups;
};
}  // namespace megalodon::ops::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {
using cpu::kTileGroups, cpu::TimestepNormBackward, cpu::TimestepNormForward, cpu::TimestepNormShape,
    cpu::TimestepNormTile;

// The weight of a step in the cumulative statistics, `count` steps counted with it.
double step_weight(std::int64_t count) {
  return 1.0 / static_cast<double>(count);
}

// Statistics of a tile's groups. The cumulative ones are float64 while a call lasts: float32 would stop
// following after some 10^5 steps.
struct Statistics {
  double mean[kTileGroups], var[kTileGroups];
  float mean_high[kTileGroups], mean_low[kTileGroups];  // their sum is mean
  float var_rounded[kTileGroups], rstd[kTileGroups];
  // Of one step, the mean less mean_high.
  float step_mean[kTileGroups], step_var[kTileGroups];
};

template <class T>
void moments(const T* HWY_RESTRICT x, std::int64_t groups, std::int64_t K, Statistics& s) {
  const float scale = 1.0f / static_cast<float>(K);
  for (std::int64_t g = 0; g < groups; ++g, x += K) {
    const auto shift = hn::Set(kFloat, s.mean_high[g]);
    auto sum = hn::Zero(kFloat), squares = hn::Zero(kFloat);
    for_vectors(K, [&](std::int64_t i, auto part)
                       HWY_ATTR { sum = hn::Add(sum, within(hn::Sub(load(x + i, part), shift), part)); });
    s.step_mean[g] = sum_of_lanes(sum) * scale;
    const auto mean = hn::Set(kFloat, s.step_mean[g]);
    for_vectors(K, [&](std::int64_t i, auto part) HWY_ATTR {
      const auto d = within(hn::Sub(hn::Sub(load(x + i, part), shift), mean), part);
      squares = hn::MulAdd(d, d, squares);
    });
    s.step_var[g] = sum_of_lanes(squares) * scale;
  }
}

void scan(double w, std::int64_t groups, Statistics& s) {
  for (std::int64_t g = 0; g < groups; ++g) {
    const double distance =
        (static_cast<double>(s.mean_high[g]) - s.mean[g]) + static_cast<double>(s.step_mean[g]);
    const double step_var = static_cast<double>(s.step_var[g]);
    s.var[g] = (1 - w) * s.var[g] + w * (step_var + (1 - w) * distance * distance);
    s.mean[g] += w * distance;
    s.mean_high[g] = static_cast<float>(s.mean[g]);
    s.mean_low[g] = static_cast<float>(s.mean[g] - static_cast<double>(s.mean_high[g]));
    s.var_rounded[g] = static_cast<float>(s.var[g]);
  }
}

void reciprocal_deviations(float eps, std::int64_t groups, Statistics& s) {
  for_vectors(groups, [&](std::int64_t g, auto part) HWY_ATTR {
    const auto var = hn::Add(load(s.var_rounded + g, part), hn::Set(kFloat, eps));
    store(hn::Div(hn::Set(kFloat, 1.0f), hn::Sqrt(var)), s.rstd + g, part);
  });
}

template <class T>
void normalise(const T* HWY_RESTRICT x, const float* HWY_RESTRICT weight, const float* HWY_RESTRICT bias,
               std::int64_t groups, std::int64_t K, const Statistics& s, T* HWY_RESTRICT y) {
  for (std::int64_t g = 0; g < groups; ++g, x += K, y += K, weight += K, bias += K) {
    const auto high = hn::Set(kFloat, s.mean_high[g]), low = hn::Set(kFloat, s.mean_low[g]);
    const auto rstd = hn::Set(kFloat, s.rstd[g]);
    for_vectors(K, [&](std::int64_t i, auto part) HWY_ATTR {
      const auto normal = hn::Mul(hn::Sub(hn::Sub(load(x + i, part), high), low), rstd);
      const auto scaled = hn::MulAdd(normal, load(weight + i, part), normal);
      store(hn::Add(scaled, load(bias + i, part)), y + i, part);
    });
  }
}

template <class T>
void forward_tile(const TimestepNormShape& shape, const TimestepNormForward<T>& a,
                  const TimestepNormTile& tile) {
  const auto [B, L, D, G] = shape;
  const auto [b, first, groups] = tile;
  const std::int64_t K = D / G, features = groups * K;
  std::int64_t count = a.count[b];
  Statistics s;
  for (std::int64_t g = 0; g < groups; ++g) {
    s.mean[g] = static_cast<double>(a.mean[b * G + first + g]);
    s.var[g] = static_cast<double>(a.var[b * G + first + g]);
    s.mean_high[g] = count > 0 ? a.mean[b * G + first + g] : 0.0f;
    s.var_rounded[g] = a.var[b * G + first + g];
  }
  reciprocal_deviations(a.eps, groups, s);
  for (std::int64_t t = 0; t < L; ++t) {
    const std::int64_t row = (b * L + t) * D + first * K;
    if (a.mask != nullptr && a.mask[b * L + t] != 0) {
      std::fill_n(a.y + row, features, T{});
    } else {
      moments(a.x + row, groups, K, s);
      scan(step_weight(++count), groups, s);
      reciprocal_deviations(a.eps, groups, s);
      normalise(a.x + row, a.weight + first * K, a.bias + first * K, groups, K, s, a.y + row);
    }
    if (a.step_mean != nullptr) {
      std::copy_n(s.mean_high, groups, a.step_mean + (b * L + t) * G + first);
      std::copy_n(s.rstd, groups, a.step_rstd + (b * L + t) * G + first);
    }
  }
  for (std::int64_t g = 0; g < groups; ++g) {
    a.last_mean[b * G + first + g] = static_cast<float>(s.mean[g]);
    a.last_var[b * G + first + g] = static_cast<float>(s.var[g]);
  }
}

// Of a tile's groups: the gradients of the cumulative statistics, from the last step backwards, and what one
// step adds to them and takes from them. With u = x - mean and h = dy (1 + weight),
//   dx = h rstd + slope u + offset.
struct Adjoint {
  double d_mean[kTileGroups], d_var[kTileGroups];
  float sum_u[kTileGroups], sum_h[kTileGroups], sum_hu[kTileGroups];
  float slope[kTileGroups], offset[kTileGroups];
};

template <class T>
void reduce(const T* HWY_RESTRICT x, const T* HWY_RESTRICT dy, const float* HWY_RESTRICT weight,
            const float* HWY_RESTRICT mean, const float* HWY_RESTRICT rstd, std::int64_t groups,
            std::int64_t K, Adjoint& s, float* HWY_RESTRICT d_weight, float* HWY_RESTRICT d_bias) {
  for (std::int64_t g = 0; g < groups; ++g, x += K, dy += K, weight += K, d_weight += K, d_bias += K) {
    const auto mean_g = hn::Set(kFloat, mean[g]), rstd_g = hn::Set(kFloat, rstd[g]);
    auto sum_u = hn::Zero(kFloat), sum_h = hn::Zero(kFloat), sum_hu = hn::Zero(kFloat);
    for_vectors(K, [&](std::int64_t i, auto part) HWY_ATTR {
      const auto dy_i = load(dy + i, part);
      const auto u = within(hn::Sub(load(x + i, part), mean_g), part);
      const auto h = hn::MulAdd(dy_i, load(weight + i, part), dy_i);
      sum_u = hn::Add(sum_u, u);
      sum_h = hn::Add(sum_h, h);
      sum_hu = hn::MulAdd(h, u, sum_hu);
      store(hn::MulAdd(dy_i, hn::Mul(u, rstd_g), load(d_weight + i, part)), d_weight + i, part);
      store(hn::Add(dy_i, load(d_bias + i, part)), d_bias + i, part);
    });
    s.sum_u[g] = sum_of_lanes(sum_u);
    s.sum_h[g] = sum_of_lanes(sum_h);
    s.sum_hu[g] = sum_of_lanes(sum_hu);
  }
}

// The scan's step backwards. With m the mean of the step's features and `mean` that after it,
// m - mean = (1 - w) (m - mean_before): d_mean_before and dm follow from it without mean_before.
void scan_back(double w, const float* HWY_RESTRICT rstd, std::int64_t groups, std::int64_t K, Adjoint& s) {
  const double scale = 1.0 / static_cast<double>(K);
  for (std::int64_t g = 0; g < groups; ++g) {
    const double r = static_cast<double>(rstd[g]);
    const double d_mean = s.d_mean[g] - r * static_cast<double>(s.sum_h[g]);
    const double d_var = s.d_var[g] - 0.5 * r * r * r * static_cast<double>(s.sum_hu[g]);
    const double distance = static_cast<double>(s.sum_u[g]) * scale;  // m - mean
    const double pull = w < 1 ? 2 * w * d_var * distance : 0;         // the first step has no mean before it
    const double slope = 2 * w * d_var * scale;
    s.slope[g] = static_cast<float>(slope);
    s.offset[g] = static_cast<float>((w * d_mean + pull) * scale - slope * distance);
    s.d_mean[g] = (1 - w) * d_mean - pull;
    s.d_var[g] = (1 - w) * d_var;
  }
}

template <class T>
void input_gradient(const T* HWY_RESTRICT x, const T* HWY_RESTRICT dy, const float* HWY_RESTRICT weight,
                    const float* HWY_RESTRICT mean, const float* HWY_RESTRICT rstd, std::int64_t groups,
                    std::int64_t K, const Adjoint& s, T* HWY_RESTRICT dx) {
  for (std::int64_t g = 0; g < groups; ++g, x += K, dy += K, weight += K, dx += K) {
    const auto mean_g = hn::Set(kFloat, mean[g]), rstd_g = hn::Set(kFloat, rstd[g]);
    const auto slope = hn::Set(kFloat, s.slope[g]), offset = hn::Set(kFloat, s.offset[g]);
    for_vectors(K, [&](std::int64_t i, auto part) HWY_ATTR {
      const auto dy_i = load(dy + i, part);
      const auto h = hn::MulAdd(dy_i, load(weight + i, part), dy_i);
      const auto u = hn::Sub(load(x + i, part), mean_g);
      store(hn::MulAdd(h, rstd_g, hn::MulAdd(slope, u, offset)), dx + i, part);
    });
  }
}

template <class T>
void backward_tile(const TimestepNormShape& shape, const TimestepNormBackward<T>& a,
                   const TimestepNormTile& tile) {
  const auto [B, L, D, G] = shape;
  const auto [b, first, groups] = tile;
  const std::int64_t K = D / G, features = groups * K, columns = b * D + first * K;
  std::int64_t count = a.last_count[b];
  Adjoint s;
  for (std::int64_t g = 0; g < groups; ++g) {
    s.d_mean[g] = static_cast<double>(a.d_last_mean[b * G + first + g]);
    s.d_var[g] = static_cast<double>(a.d_last_var[b * G + first + g]);
  }
  ColumnSums d_weight(features, a.d_weight + columns), d_bias(features, a.d_bias + columns);
  const float* const weight = a.weight + first * K;
  for (std::int64_t t = L - 1; t >= 0; --t) {
    const std::int64_t row = (b * L + t) * D + first * K, step = (b * L + t) * G + first;
    if (a.mask != nullptr && a.mask[b * L + t] != 0) {
      std::fill_n(a.dx + row, features, T{});
      continue;
    }
    const float *const mean = a.step_mean + step, *const rstd = a.step_rstd + step;
    reduce(a.x + row, a.dy + row, weight, mean, rstd, groups, K, s, d_weight.recent(), d_bias.recent());
    scan_back(step_weight(count--), rstd, groups, K, s);
    input_gradient(a.x + row, a.dy + row, weight, mean, rstd, groups, K, s, a.dx + row);
    d_weight.count_row();
    d_bias.count_row();
  }
  d_weight.finish();
  d_bias.finish();
  for (std::int64_t g = 0; g < groups; ++g) {
    a.d_mean[b * G + first + g] = static_cast<float>(s.d_mean[g]);
    a.d_var[b * G + first + g] = static_cast<float>(s.d_var[g]);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {
namespace {

// A group's numbers do not depend on the tile it is in. A sequence is one tile where the threads have whole
// sequences each, and is cut otherwise.
template <class F>
void for_tiles(const TimestepNormShape& shape, F&& f) {
  const auto [B, L, D, G] = shape;
  const std::int64_t threads = thread_count();
  const std::int64_t wanted = std::min(G, B % threads == 0 ? 1 : threads);
  const std::int64_t groups = std::min(kTileGroups, (G + wanted - 1) / wanted),
                     tiles = (G + groups - 1) / groups;
  constexpr std::int64_t kLeast = 1 << 14;  // elements that are worth a thread
  const std::int64_t grain =
      std::max<std::int64_t>(1, kLeast / std::max<std::int64_t>(1, L * groups * (D / G)));
  parallel_for(B * tiles, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t first = i % tiles * groups;
      f(TimestepNormTile{i / tiles, first, std::min(groups, G - first)});
    }
  });
}

}  // namespace

template <class T>
void timestep_norm_forward(const TimestepNormShape& shape, const TimestepNormForward<T>& a) {
  const auto kernel = MEGALODON_DISPATCH(forward_tile<T>);
  for_tiles(shape, [&](const TimestepNormTile& tile) { kernel(shape, a, tile); });
}

template <class T>
void timestep_norm_backward(const TimestepNormShape& shape, const TimestepNormBackward<T>& a) {
  const auto kernel = MEGALODON_DISPATCH(backward_tile<T>);
  for_tiles(shape, [&](const TimestepNormTile& tile) { kernel(shape, a, tile); });
}

template void timestep_norm_forward(const TimestepNormShape&, const TimestepNormForward<float>&);
template void timestep_norm_forward(const TimestepNormShape&, const TimestepNormForward<Bfloat16>&);
template void timestep_norm_backward(const TimestepNormShape&, const TimestepNormBackward<float>&);
template void timestep_norm_backward(const TimestepNormShape&, const TimestepNormBackward<Bfloat16>&);

}  // namespace megalodon::ops::cpu
#endif
