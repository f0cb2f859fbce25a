#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// The last `kept` <= C of values [B, L, width] into cache [B, C, width].
template <class T>
void cache_store(const T* values, const std::int64_t* start, std::int64_t B, std::int64_t L,
                 std::int64_t kept, std::int64_t C, std::int64_t width, T* cache, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
