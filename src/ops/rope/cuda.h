#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// Arguments of ops/rope/rope.h. x, y [B, L, H, d]; start [B].
template <class T>
void rope(const T* x, const std::int64_t* start, std::int64_t B, std::int64_t L, std::int64_t H,
          std::int64_t d, std::int64_t chunk, double base, bool inverse, T* y, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
