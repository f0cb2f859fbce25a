#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// As ops/cross_entropy/kernel.h, on a device; a target that is no class gives NaN.
template <class E>
void cross_entropy_forward(const E* logits, const std::int64_t* targets, std::int64_t ignored, std::int64_t T,
                           std::int64_t V, float* nll, cudaStream_t stream);
template <class E>
void cross_entropy_backward(const E* logits, const std::int64_t* targets, std::int64_t ignored,
                            const float* nll, const float* d_nll, std::int64_t T, std::int64_t V, E* d_logits,
                            cudaStream_t stream);

}  // namespace megalodon::ops::cuda
