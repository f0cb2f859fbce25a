#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// As ops/swiglu/kernel.h, on a device, for R rows of F elements: those of a and b begin `step` elements
// apart, those of da and db another step, the others lie one after the other.
template <class T>
struct SwigluInputs {
  const T *a, *b;  // b null: silu(a) alone
  std::int64_t R, F, step;
};
template <class T>
void swiglu_forward(const SwigluInputs<T>& x, T* y, cudaStream_t stream);

template <class T>
struct SwigluGradients {
  const T* dy;
  T *da, *db, *y;  // db null without b; y null where it is not wanted
  std::int64_t step;
};
template <class T>
void swiglu_backward(const SwigluInputs<T>& x, const SwigluGradients<T>& d, cudaStream_t stream);
// The same with the sums of da over each `rows` rows: sums [ceil(R / rows), F].
template <class T>
void swiglu_backward_with_sums(const SwigluInputs<T>& x, const SwigluGradients<T>& d, std::int64_t rows,
                               float* sums, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
