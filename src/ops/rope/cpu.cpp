#include "ops/rope/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/rope/cpu.cpp"
#include <hwy/foreach_target.h>

#include <algorithm>
#include <cmath>
#include <complex>

#include "base/parallel.h"
#include "ops/column_sums.h"
#include "ops/simd-inl.h"
#include "ops/simd_dispatch.h"

HWY_BEFORE_NAMESPACE();
namespace megalodon::ops {
namespace HWY_NAMESPACE {
namespace {

template <class T>
void rotate(const T* HWY_RESTRICT x, const float* HWY_RESTRICT rotation, bool inverse, std::int64_t H,
            std::int64_t d, T* HWY_RESTRICT y) {
  const auto sign = hn::Set(kFloat, inverse ? -1.0f : 1.0f);
  for (std::int64_t h = 0; h < H; ++h) {
    for_vectors(d, [&](std::int64_t i, auto part) HWY_ATTR {
      const auto row = [&](std::int64_t j) HWY_ATTR { return load(x + h * d + j, part); };
      const auto sin = hn::Mul(sign, load(rotation + d + i, part));
      store(hn::MulAdd(row(i), load(rotation + i, part), hn::Mul(exchanged(row, i), sin)), y + h * d + i,
            part);
    });
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace megalodon::ops
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace megalodon::ops::cpu {

Rotations::Rotations(const std::int64_t* start, std::int64_t B, std::int64_t L, std::int64_t chunk,
                     double base, std::int64_t d)
    : L_(L), chunk_(chunk), d_(d) {
  for (std::int64_t i = 0; i < d / 2; ++i)
    frequency_.push_back(std::pow(base, static_cast<double>(2 * i) / static_cast<double>(-d)));
  if (B == 0 || L == 0) return;
  for (std::int64_t b = 0; b < B; ++b) first_.push_back(chunk > 0 ? start[b] % chunk : start[b]);

  lowest_ = *std::min_element(first_.begin(), first_.end());
  std::int64_t highest = *std::max_element(first_.begin(), first_.end()) + L - 1;
  if (chunk > 0 && highest >= chunk) {
    lowest_ = 0;
    highest = chunk - 1;
  }
  shared_ = highest - lowest_ < B * L;
  const std::int64_t rows = shared_ ? highest - lowest_ + 1 : B * L;
  values_.resize(static_cast<std::size_t>(rows * 2 * d));
  if (shared_) {
    fill(0, lowest_, rows);
    return;
  }
  for (std::int64_t b = 0; b < B; ++b) {
    for (std::int64_t t = 0; t < L;) {
      const std::int64_t p = position(b, t), count = chunk > 0 ? std::min(L - t, chunk - p) : L - t;
      fill(b * L + t, p, count);
      t += count;
    }
  }
}

// By blocks: the angle of a block's first position, then turns by 0 .. kBlock-1 positions, products of unit
// complex numbers in float64, which cost less than a sine each.
void Rotations::fill(std::int64_t row, std::int64_t first, std::int64_t count) {
  constexpr std::int64_t kBlock = 32;
  const std::int64_t pairs = d_ / 2, turns = std::min(kBlock, count);
  std::vector<std::complex<double>> turn(static_cast<std::size_t>(turns * pairs));
  for (std::int64_t j = 0; j < turns; ++j)
    for (std::int64_t i = 0; i < pairs; ++i)
      turn[static_cast<std::size_t>(j * pairs + i)] =
          std::polar(1.0, static_cast<double>(j) * frequency_[static_cast<std::size_t>(i)]);
  parallel_for((count + kBlock - 1) / kBlock, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      const auto origin = static_cast<double>(first + block * kBlock);
      for (std::int64_t i = 0; i < pairs; ++i) {
        const auto at = std::polar(1.0, origin * frequency_[static_cast<std::size_t>(i)]);
        for (std::int64_t j = 0; j < std::min(kBlock, count - block * kBlock); ++j) {
          const auto by = turn[static_cast<std::size_t>(j * pairs + i)];
          const auto cos = static_cast<float>(at.real() * by.real() - at.imag() * by.imag());
          const auto sin = static_cast<float>(at.real() * by.imag() + at.imag() * by.real());
          float* const out = values_.data() + (row + block * kBlock + j) * 2 * d_ + 2 * i;
          out[0] = out[1] = cos;
          out[d_] = -sin;
          out[d_ + 1] = sin;
        }
      }
    }
  });
}

template <class T>
void rope(const T* x, const Rotations& rotations, bool inverse, std::int64_t B, std::int64_t L,
          std::int64_t H, std::int64_t d, T* y) {
  const auto kernel = MEGALODON_DISPATCH(rotate<T>);
  parallel_for(B * L, grain_of_rows(H * d + 1), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row)
      kernel(x + row * H * d, rotations.of(row / L, row % L), inverse, H, d, y + row * H * d);
  });
}

template void rope(const float*, const Rotations&, bool, std::int64_t, std::int64_t, std::int64_t,
                   std::int64_t, float*);
template void rope(const Bfloat16*, const Rotations&, bool, std::int64_t, std::int64_t, std::int64_t,
                   std::int64_t, Bfloat16*);

}  // namespace megalodon::ops::cpu
#endif
