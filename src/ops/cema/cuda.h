#pragma once
#include <cuda_runtime_api.h>

#include "ops/cema/kernel.h"

namespace megalodon::ops::cuda {

using cpu::CemaCoefficients, cpu::CemaShape;

// Components of a feature that the kernels take.
inline constexpr std::int64_t kMostCemaComponents = 32;

// How a sequence is cut: into segments that run side by side (their states are made first), each of whole
// spans; the backward pass starts every span from its state.
struct CemaCut {
  std::int64_t segments, spans;  // of a sequence
};
inline constexpr std::int64_t kCemaSpan = 64;  // steps
CemaCut cema_cut(const CemaShape& shape);

// Pointers are those of ops/cema/kernel.h, on a device. segment_state [B, segments, D, N, 2] is scratch
// memory.
template <class T>
void cema_forward(const CemaShape& shape, const CemaCoefficients& c, const T* x, float* segment_state, T* y,
                  float* h_last, cudaStream_t stream);

struct CemaBackwardWork {
  float* segment_state;  // [B, segments, D, N, 2]
  float* span_state;     // [B, spans, D, N, 2]
  float* sums;           // [5 N + 1, B segments, D]: the gradients of p, q, eta (real, imaginary), omega
};
template <class T>
void cema_backward(const CemaShape& shape, const CemaCoefficients& c, const T* x, const T* dy,
                   const float* dh_last, const CemaBackwardWork& work, T* dx, float* dh0,
                   cudaStream_t stream);

}  // namespace megalodon::ops::cuda
