#include "ops/layer_norm/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/layer_norm/cpu.cpp"
#include <hwy/foreach_target.h>

#include <cmath>

#include "base/parallel.h"
#include "ops/column_sums.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {

// The mean is a float32, off by `rest` where x lies far from 0: the sum of x - mean shows by how much.
template <class T>
void forward(const T* HWY_RESTRICT x, const float* HWY_RESTRICT weight, const float* HWY_RESTRICT bias,
             float eps, std::int64_t D, T* HWY_RESTRICT y, float* HWY_RESTRICT mean,
             float* HWY_RESTRICT rstd) {
  const float scale = 1.0f / static_cast<float>(D);
  auto sum = hn::Zero(kFloat), squares = hn::Zero(kFloat);
  for_vectors(D, [&](std::int64_t i, auto part) HWY_ATTR { sum = hn::Add(sum, load(x + i, part)); });
  *mean = sum_of_lanes(sum) * scale;
  const auto mean_ = hn::Set(kFloat, *mean);
  sum = hn::Zero(kFloat);
  for_vectors(D, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto u = within(hn::Sub(load(x + i, part), mean_), part);
    sum = hn::Add(sum, u);
    squares = hn::MulAdd(u, u, squares);
  });
  const float rest = sum_of_lanes(sum) * scale;
  const float var = std::max(0.0f, sum_of_lanes(squares) * scale - rest * rest);
  *rstd = 1.0f / std::sqrt(var + eps);
  const auto rest_ = hn::Set(kFloat, rest), r = hn::Set(kFloat, *rstd);
  for_vectors(D, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto normal = hn::Mul(hn::Sub(hn::Sub(load(x + i, part), mean_), rest_), r);
    if (weight == nullptr) {
      store(normal, y + i, part);
    } else {
      const auto scaled = hn::MulAdd(normal, load(weight + i, part), normal);
      store(hn::Add(scaled, load(bias + i, part)), y + i, part);
    }
  });
}

// With u = x - mean - rest the centered input and h = dy (1 + weight),
//   dx = rstd (h - mean(h)) - rstd^3 u mean(h u),   d_weight += dy u rstd,   d_bias += dy.
template <class T>
void backward(const T* HWY_RESTRICT x, const float* HWY_RESTRICT weight, float mean, float rstd,
              const T* HWY_RESTRICT dy, std::int64_t D, T* HWY_RESTRICT dx, float* HWY_RESTRICT d_weight,
              float* HWY_RESTRICT d_bias) {
  const float scale = 1.0f / static_cast<float>(D);
  const auto mean_ = hn::Set(kFloat, mean), r = hn::Set(kFloat, rstd);
  const auto h_of = [&](std::int64_t i, FloatVec dy_i, auto part) HWY_ATTR {
    return weight != nullptr ? hn::MulAdd(dy_i, load(weight + i, part), dy_i) : dy_i;
  };
  auto sum_d = hn::Zero(kFloat), sum_h = hn::Zero(kFloat), sum_hd = hn::Zero(kFloat);
  for_vectors(D, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto h = h_of(i, load(dy + i, part), part);
    const auto d = within(hn::Sub(load(x + i, part), mean_), part);
    sum_d = hn::Add(sum_d, d);
    sum_h = hn::Add(sum_h, h);
    sum_hd = hn::MulAdd(h, d, sum_hd);
  });
  const float rest = sum_of_lanes(sum_d) * scale, total_h = sum_of_lanes(sum_h);
  const float hu = (sum_of_lanes(sum_hd) - rest * total_h) * scale;
  const auto rest_ = hn::Set(kFloat, rest), mean_h = hn::Set(kFloat, total_h * scale);
  const auto pull = hn::Set(kFloat, rstd * rstd * hu);
  for_vectors(D, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto dy_i = load(dy + i, part);
    const auto u = hn::Sub(hn::Sub(load(x + i, part), mean_), rest_);
    const auto h = hn::Sub(h_of(i, dy_i, part), mean_h);
    store(hn::Mul(r, hn::NegMulAdd(u, pull, h)), dx + i, part);
    if (weight != nullptr) {
      store(hn::MulAdd(dy_i, hn::Mul(u, r), load(d_weight + i, part)), d_weight + i, part);
      store(hn::Add(dy_i, load(d_bias + i, part)), d_bias + i, part);
    }
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {

template <class T>
void layer_norm_forward(const T* x, const float* weight, const float* bias, float eps, std::int64_t rows,
                        std::int64_t D, T* y, float* mean, float* rstd) {
  const auto kernel = MEGALODON_DISPATCH(forward<T>);
  parallel_for(rows, grain_of_rows(D), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row)
      kernel(x + row * D, weight, bias, eps, D, y + row * D, mean + row, rstd + row);
  });
}

template <class T>
void layer_norm_backward(const T* x, const float* weight, const float* mean, const float* rstd, const T* dy,
                         std::int64_t rows, std::int64_t D, T* dx, double* d_weight, double* d_bias) {
  const auto kernel = MEGALODON_DISPATCH(backward<T>);
  const std::int64_t columns = weight != nullptr ? D : 0;
  for_row_blocks(rows, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
    ColumnSums for_weight(columns, d_weight + block * columns), for_bias(columns, d_bias + block * columns);
    for (std::int64_t row = begin; row < end; ++row) {
      kernel(x + row * D, weight, mean[row], rstd[row], dy + row * D, D, dx + row * D, for_weight.recent(),
             for_bias.recent());
      for_weight.count_row();
      for_bias.count_row();
    }
    for_weight.finish();
    for_bias.finish();
  });
}

template void layer_norm_forward(const float*, const float*, const float*, float, std::int64_t, std::int64_t,
                                 float*, float*, float*);
template void layer_norm_forward(const Bfloat16*, const float*, const float*, float, std::int64_t,
                                 std::int64_t, Bfloat16*, float*, float*);
template void layer_norm_backward(const float*, const float*, const float*, const float*, const float*,
                                  std::int64_t, std::int64_t, float*, double*, double*);
template void layer_norm_backward(const Bfloat16*, const float*, const float*, const float*, const Bfloat16*,
                                  std::int64_t, std::int64_t, Bfloat16*, double*, double*);

}  // namespace megalodon::ops::cpu
#endif
