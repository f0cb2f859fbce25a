#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

// n elements, whose gradients are to be divided by divisors[divisor].
struct AdamWPart {
  float* parameter;
  const float* gradient;
  float *first_moment, *second_moment;
  Bfloat16* rounded;  // the parameter's new values again, or null
  std::int64_t n;
  std::int64_t divisor;
};

struct AdamWNumbers {
  double beta1, beta2, eps, weight_decay;
};

// steps, divisors, rate and skip lie on the device; steps is counted up unless skip is 1. scratch [3].
void adamw(const std::vector<AdamWPart>& parts, float* steps, const float* divisors, const float* rate,
           const float* skip, const AdamWNumbers& numbers, float* scratch, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
