#pragma once
#include <cuda_runtime_api.h>

#include "ops/timestep_norm/kernel.h"

namespace megalodon::ops::cuda {

using cpu::TimestepNormBackward, cpu::TimestepNormForward, cpu::TimestepNormShape;

// Steps of a tile: what a block normalises, and what the cumulative statistics skip at once.
inline constexpr std::int64_t kTimestepNormTile = 32;

struct TimestepNormWork {
  std::int64_t tiles;  // of a sequence
  double* tile;        // [B, tiles, 4, G]
  float* step;         // [B, L, 3, G]; forward uses two of the three
};

// Pointers are those of ops/timestep_norm/kernel.h, on a device. `work` is scratch memory.
template <class T>
void timestep_norm_forward(const TimestepNormShape& shape, const TimestepNormForward<T>& a,
                           const TimestepNormWork& work, cudaStream_t stream);
// sums [B, tiles, 2, D]: the gradients of weight and bias of each tile, instead of a.d_weight and a.d_bias.
template <class T>
void timestep_norm_backward(const TimestepNormShape& shape, const TimestepNormBackward<T>& a,
                            const TimestepNormWork& work, float* sums, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
