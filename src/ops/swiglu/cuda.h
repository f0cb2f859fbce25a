#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// As ops/swiglu/kernel.h, on a device.
template <class T>
void swiglu_forward(const T* a, const T* b, T* y, std::int64_t n, cudaStream_t stream);
template <class T>
void swiglu_backward(const T* a, const T* b, const T* dy, T* da, T* db, T* y, std::int64_t n,
                     cudaStream_t stream);

}  // namespace megalodon::ops::cuda
