#pragma once
#include <cuda_runtime_api.h>

#include "ops/cema/kernel.h"

namespace megalodon::ops::cuda {

using cpu::CemaCoefficients, cpu::CemaShape;

// Components of a feature that the kernels take.
inline constexpr std::int64_t kMostCemaComponents = 32;

// In registers: the steps from `first` on, in segments that run side by side (their states are made first),
// each of whole spans; the backward pass starts every span from its state.
struct CemaCut {
  std::int64_t segments, spans;  // of a sequence
};
inline constexpr std::int64_t kCemaSpan = 64;  // steps
CemaCut cema_cut(const CemaShape& shape, std::int64_t first);

// Pointers are those of ops/cema/kernel.h, on a device; c.h0 is the state before `first`. segment_state [B,
// segments, D, N, 2] is scratch memory.
template <class T>
void cema_forward(const CemaShape& shape, std::int64_t first, const CemaCoefficients& c, const T* x,
                  float* segment_state, T* y, float* h_last, cudaStream_t stream);

// Rows of sums of the gradients of the coefficients: [D, N, 2] twice, [D, N] and [D].
struct CemaSums {
  float *q, *eta, *p, *omega;  // of the first row
  std::int64_t apart;          // numbers from row to row
};

struct CemaBackwardWork {
  float* segment_state;  // [B, segments, D, N, 2]
  float* span_state;     // [B, spans, D, N, 2]
  CemaSums sums;         // B segments rows
};
// dh0: the gradient of the state before `first`.
template <class T>
void cema_backward(const CemaShape& shape, std::int64_t first, const CemaCoefficients& c, const T* x,
                   const T* dy, const float* dh_last, const CemaBackwardWork& work, T* dx, float* dh0,
                   cudaStream_t stream);

// On a Hopper GPU's tensor cores: the first L / kCemaTile tiles of steps of bfloat16 sequences whose D is a
// multiple of kCemaTileFeatures, with N <= kMostBlockComponents; arrays at multiples of 16 bytes.
bool has_cema_blocks();  // for the current device
inline constexpr std::int64_t kCemaTile = 512, kCemaTileFeatures = 16, kMostBlockComponents = 16;
// Groups of sequences that run side by side.
std::int64_t cema_block_groups(const CemaShape& shape);
// y (null: not wanted) from x; h_last [B, D, N, 2].
void cema_blocks(const CemaShape& shape, const CemaCoefficients& c, const Bfloat16* x, Bfloat16* y,
                 float* h_last, cudaStream_t stream);
// dh_last [B, D, N, 2] or null; sums: cema_block_groups rows.
void cema_blocks_backward(const CemaShape& shape, const CemaCoefficients& c, const Bfloat16* x,
                          const Bfloat16* dy, const float* dh_last, Bfloat16* dx, float* dh0,
                          const CemaSums& sums, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
