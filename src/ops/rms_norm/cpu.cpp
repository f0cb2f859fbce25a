#include "ops/rms_norm/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/rms_norm/cpu.cpp"
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

template <class T>
void forward(const T* HWY_RESTRICT x, const float* HWY_RESTRICT weight, float eps, std::int64_t D,
             T* HWY_RESTRICT y, float* HWY_RESTRICT rstd) {
  auto squares = hn::Zero(kFloat);
  for_vectors(D, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto x_i = load(x + i, part);
    squares = hn::MulAdd(x_i, x_i, squares);
  });
  *rstd = 1.0f / std::sqrt(sum_of_lanes(squares) / static_cast<float>(D) + eps);
  const auto r = hn::Set(kFloat, *rstd);
  for_vectors(D, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto normal = hn::Mul(load(x + i, part), r);
    store(weight != nullptr ? hn::MulAdd(normal, load(weight + i, part), normal) : normal, y + i, part);
  });
}

// With h = dy (1 + weight): dx = rstd (h - x rstd^2 mean(h x)), and d_weight += dy x rstd.
template <class T>
void backward(const T* HWY_RESTRICT x, const float* HWY_RESTRICT weight, float rstd, const T* HWY_RESTRICT dy,
              std::int64_t D, T* HWY_RESTRICT dx, float* HWY_RESTRICT d_weight) {
  const auto r = hn::Set(kFloat, rstd);
  auto sum = hn::Zero(kFloat);
  for_vectors(D, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto dy_i = load(dy + i, part), dy_x = hn::Mul(dy_i, load(x + i, part));
    if (weight == nullptr) {
      sum = hn::Add(sum, dy_x);
    } else {
      sum = hn::Add(sum, hn::MulAdd(dy_x, load(weight + i, part), dy_x));
      store(hn::MulAdd(dy_x, r, load(d_weight + i, part)), d_weight + i, part);
    }
  });
  const auto pull = hn::Set(kFloat, rstd * rstd * (sum_of_lanes(sum) / static_cast<float>(D)));
  for_vectors(D, [&](std::int64_t i, auto part) HWY_ATTR {
    const auto dy_i = load(dy + i, part);
    const auto h = weight != nullptr ? hn::MulAdd(dy_i, load(weight + i, part), dy_i) : dy_i;
    store(hn::Mul(r, hn::NegMulAdd(load(x + i, part), pull, h)), dx + i, part);
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {

template <class T>
void rms_norm_forward(const T* x, const float* weight, float eps, std::int64_t rows, std::int64_t D, T* y,
                      float* rstd) {
  const auto kernel = MEGALODON_DISPATCH(forward<T>);
  parallel_for(rows, grain_of_rows(D), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row)
      kernel(x + row * D, weight, eps, D, y + row * D, rstd + row);
  });
}

template <class T>
void rms_norm_backward(const T* x, const float* weight, const float* rstd, const T* dy, std::int64_t rows,
                       std::int64_t D, T* dx, double* d_weight) {
  const auto kernel = MEGALODON_DISPATCH(backward<T>);
  const std::int64_t columns = weight != nullptr ? D : 0;
  for_row_blocks(rows, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
    ColumnSums sums(columns, d_weight + block * columns);
    for (std::int64_t row = begin; row < end; ++row) {
      kernel(x + row * D, weight, rstd[row], dy + row * D, D, dx + row * D, sums.recent());
      sums.count_row();
    }
    sums.finish();
  });
}

template void rms_norm_forward(const float*, const float*, float, std::int64_t, std::int64_t, float*, float*);
template void rms_norm_forward(const Bfloat16*, const float*, float, std::int64_t, std::int64_t, Bfloat16*,
                               float*);
template void rms_norm_backward(const float*, const float*, const float*, const float*, std::int64_t,
                                std::int64_t, float*, double*);
template void rms_norm_backward(const Bfloat16*, const float*, const float*, const Bfloat16*, std::int64_t,
                                std::int64_t, Bfloat16*, double*);

}  // namespace megalodon::ops::cpu
#endif
