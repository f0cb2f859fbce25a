#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace megalodon::ops::cuda {

// alpha, delta, p [D, N], theta [D]; gamma, q, eta [D, N, 2].
void cema_coefficients(std::int64_t D, std::int64_t N, const float* alpha, const float* delta,
                       const float* theta, const float* gamma, float* p, float* q, float* eta,
                       cudaStream_t stream);

struct CemaParameterGradients {
  float *alpha, *delta, *theta, *gamma;
};
void cema_coefficients_backward(std::int64_t D, std::int64_t N, const float* alpha, const float* delta,
                                const float* theta, const float* dp, const float* dq, const float* deta,
                                const CemaParameterGradients& gradients, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
