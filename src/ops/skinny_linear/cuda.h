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
  int out;
  unsigned first_tile;  // set by the launch, as SkinnyCall::tiles
};

__host__ __device__ inline bool has_same_input(const SkinnyLayer& a, const SkinnyLayer& b) {
  return a.x == b.x && a.norm == b.norm && a.norm_weight == b.norm_weight && a.norm_bias == b.norm_bias;
}

struct SkinnyCall {
  SkinnyLayer layer[kMostSkinnyLayers];
  int layers, rows, width;  // width: features of x, a multiple of 32
  float eps;
  unsigned tiles;
};
// Outputs of a layer that a block makes at once: half as many where each is of two products.
inline constexpr int kSkinnyTile = 16;
inline void place_tiles(SkinnyCall& call, int tile = kSkinnyTile) {
  call.tiles = 0;
  for (int i = 0; i < call.layers; ++i) {
    auto& layer = call.layer[i];
    const int outputs = layer.up != nullptr ? tile / 2 : tile;
    layer.first_tile = call.tiles;
    call.tiles += static_cast<unsigned>((layer.out + outputs - 1) / outputs);
  }
}
// The layer whose tile it is.
__host__ __device__ inline int layer_of(const SkinnyCall& call, unsigned tile) {
  int i = 0;
  while (i + 1 < call.layers && tile >= call.layer[i + 1].first_tile) ++i;
  return i;
}
void skinny_linear(SkinnyCall call, cudaStream_t stream);

// The same of up to kMostSkinnyRows rows, without norms; weights lie at multiples of 16 bytes.
bool has_wide_products();
void wide_products(SkinnyCall call, cudaStream_t stream);

// What stands behind the products of a layer: y = f(sums + bias) + add, f(a) = a, silu(a) or silu(a) up.
struct ProductSums {
  const float *sums, *up, *bias;  // sums, up [rows, out], up or null
  std::int64_t pitch, up_pitch;   // from row to row of sums and up
  const Bfloat16* add;            // [rows, out] as y
  Bfloat16* y;
  bool silu;
  int out;
  unsigned first_pack;  // set by the launch, as FinishCall::packs
};
struct FinishCall {
  ProductSums layer[kMostSkinnyLayers];
  int layers, rows;
  unsigned packs;
};
void finish_products(FinishCall call, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
