#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// As ops/dropout/kernel.h, on a device: the same words, so the same elements are dropped.
template <class T>
void dropout(const T* x, std::uint64_t key, std::uint32_t threshold, float scale, std::int64_t n, T* y,
             cudaStream_t stream);

}  // namespace megalodon::ops::cuda
