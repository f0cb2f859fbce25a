#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// y = x scale, n elements; scale lies on the device.
template <class T>
void scaled(const T* x, const float* scale, std::int64_t n, T* y, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
