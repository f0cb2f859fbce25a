#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// As ops/swiglu/kernel.h, on a device.
template <class T>
void swiglu_forward(const T* a, const T* b, T* y, std::int64_t n, cudaStream_t stream);

template <class T>
struct SwigluGradient {
  const T *a, *b, *dy;  // b null: silu(a) alone
  T *da, *db, *y;       // db null without b; y null where it is not wanted
};
template <class T>
void swiglu_backward(const SwigluGradient<T>& x, std::int64_t n, cudaStream_t stream);

// The same for tensors [R, F], with the sums of da over each `rows` rows: sums [ceil(R / rows), F].
template <class T>
void swiglu_backward_with_sums(const SwigluGradient<T>& x, std::int64_t R, std::int64_t F, std::int64_t rows,
                               float* sums, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
