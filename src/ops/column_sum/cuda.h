#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// y [ceil(R / rows), D]: the sums over each `rows` rows of x [R, D].
template <class T>
void column_sums(const T* x, std::int64_t R, std::int64_t D, std::int64_t rows, float* y,
                 cudaStream_t stream);

}  // namespace megalodon::ops::cuda
