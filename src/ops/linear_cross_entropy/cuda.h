#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// x *= scale, n elements; scale lies on the device. Of 1 nothing is read but that.
template <class T>
void scale(T* x, const float* scale, std::int64_t n, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
