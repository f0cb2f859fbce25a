#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// Rows of V classes and up to `row` elements what belongs to none, of which the gradients are zeros.
struct LogitRows {
  std::int64_t T, V, row;
};
// As ops/cross_entropy/kernel.h, on a device; a target that is no class gives NaN.
template <class E>
void cross_entropy_forward(const E* logits, const std::int64_t* targets, std::int64_t ignored,
                           const LogitRows& rows, float* nll, cudaStream_t stream);
template <class E>
void cross_entropy_backward(const E* logits, const std::int64_t* targets, std::int64_t ignored,
                            const float* nll, const float* d_nll, const LogitRows& rows, E* d_logits,
                            cudaStream_t stream);

}  // namespace megalodon::ops::cuda
