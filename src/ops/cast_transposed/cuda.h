#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// x [M, N], y [N, M].
void cast_transposed(const float* x, std::int64_t M, std::int64_t N, Bfloat16* y, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
