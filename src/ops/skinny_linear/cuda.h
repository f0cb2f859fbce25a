#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"
#include "ops/skinny_linear/kernel.h"

namespace megalodon::ops::cuda {

// As SkinnyLayer of ops/skinny_linear/skinny_linear.h; null where there is none of it.
struct SkinnyLayer {
  const Bfloat16 *x, *weight, *up, *add;
  const float *bias, *norm_weight, *norm_bias;
  Bfloat16* y;
  InputNorm norm;
  bool silu;
  std::int64_t out;
  unsigned first_tile;  // of the launch; set there
};

struct SkinnyCall {
  SkinnyLayer layer[kMostSkinnyLayers];
  int layers, rows;
  std::int64_t width;  // features of x, a multiple of 32
  float eps;
};
void skinny_linear(SkinnyCall call, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
