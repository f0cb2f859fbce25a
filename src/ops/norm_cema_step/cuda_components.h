#pragma once
#include "ops/cuda_device.h"

// Of a feature's moving average, four components a thread; `lanes` neighbouring threads share the feature.
namespace megalodon::ops::cuda {

__host__ __device__ inline int lanes_of(std::int64_t N) {
  int lanes = 1;
  while (lanes * 4 < N) lanes *= 2;
  return lanes;
}

// Zero where there are none.
struct Complex4 {
  float re[4], im[4];
};
__device__ inline Complex4 load_complex(const float* from, bool there) {
  Complex4 c{};
  if (!there) return c;
  float first[4], second[4];
  load(from, first);
  load(from + 4, second);
  return {{first[0], first[2], second[0], second[2]}, {first[1], first[3], second[1], second[3]}};
}
__device__ inline void store_complex(const Complex4& c, float* to) {
  const float first[4] = {c.re[0], c.im[0], c.re[1], c.im[1]},
              second[4] = {c.re[2], c.im[2], c.re[3], c.im[3]};
  store(first, to);
  store(second, to + 4);
}

// h = q h + p input; returns the real part of eta h, over the components.
__device__ inline float advance(Complex4& h, const Complex4& q, const float (&p)[4], const Complex4& eta,
                                float input) {
  float y = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float re = q.re[j] * h.re[j] - q.im[j] * h.im[j] + p[j] * input;
    h.im[j] = q.re[j] * h.im[j] + q.im[j] * h.re[j];
    h.re[j] = re;
    y += eta.re[j] * h.re[j] - eta.im[j] * h.im[j];
  }
  return y;
}

}  // namespace megalodon::ops::cuda
