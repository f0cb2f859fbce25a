#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace megalodon::ops::cuda {

// y [N, bytes]: rows of table [V, bytes] in multiples of 16 bytes, for tokens [N] in 0..V-1; others end the
// program.
void chosen_rows(const void* table, const std::int64_t* tokens, std::int64_t N, std::int64_t V,
                 std::int64_t bytes, void* y, cudaStream_t stream);

// y [ceil(N / rows), V, D]: of each `rows` rows of x [N, D] the sums by token, tokens [N] in 0..V-1; V at
// most 400.
void sums_by_token(const float* x, const std::int64_t* tokens, std::int64_t N, std::int64_t D, std::int64_t V,
                   std::int64_t rows, float* y, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
