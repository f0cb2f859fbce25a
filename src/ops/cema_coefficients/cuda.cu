#include "ops/cema_coefficients/cuda.h"
#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kWarps = 4;  // of a block, a feature each

__device__ float sigmoid(float x) {
  return 1 / (1 + expf(-x));
}

// f(i, n) for the components n = 1 .. N of this warp's feature, at i in [D, N]; a lane has every 32nd.
template <class F>
__device__ void for_components(std::int64_t d, std::int64_t N, F&& f) {
  for (std::int64_t j = threadIdx.x % 32; j < N; j += 32) f(d * N + j, static_cast<float>(j + 1));
}

constexpr float kPi = 3.14159265358979f;

__global__ void __launch_bounds__(32 * kWarps)
    forward(std::int64_t D, std::int64_t N, const float* alpha, const float* delta, const float* theta,
            const float* gamma, float* p, float* q, float* eta) {
  const std::int64_t d = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (d >= D) return;
  const float s_theta = sigmoid(theta[d]), scale = 1 / sqrtf(static_cast<float>(N)),
              step = 2 / static_cast<float>(N);  // of phi, in units of pi sigmoid(theta)
  for_components(d, N, [&](std::int64_t i, float n) {
    const float p_i = sigmoid(alpha[i]), r = 1 - p_i * sigmoid(delta[i]);
    float sine, cosine;
    sincospif(s_theta * (n * step), &sine, &cosine);
    p[i] = p_i;
    q[2 * i] = r * cosine, q[2 * i + 1] = r * sine;
    eta[2 * i] = gamma[2 * i] * scale, eta[2 * i + 1] = gamma[2 * i + 1] * scale;
  });
}

// With q = r exp(i phi): dr = Re(dq exp(-i phi)), d_phi = r Im(dq exp(-i phi)).
__global__ void __launch_bounds__(32 * kWarps)
    backward(std::int64_t D, std::int64_t N, const float* alpha, const float* delta, const float* theta,
             const float* dp, const float* dq, const float* deta, CemaParameterGradients out) {
  const std::int64_t d = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (d >= D) return;
  const float s_theta = sigmoid(theta[d]), scale = 1 / sqrtf(static_cast<float>(N)),
              step = 2 / static_cast<float>(N);  // of phi, in units of pi sigmoid(theta)
  float d_theta = 0;
  for_components(d, N, [&](std::int64_t i, float n) {
    const float p = sigmoid(alpha[i]), s = sigmoid(delta[i]), r = 1 - p * s;
    float sine, cosine;
    sincospif(s_theta * (n * step), &sine, &cosine);
    const float re = dq[2 * i], im = dq[2 * i + 1], dr = re * cosine + im * sine;
    out.alpha[i] = (dp[i] - dr * s) * (p * (1 - p));
    out.delta[i] = -dr * p * (s * (1 - s));
    out.gamma[2 * i] = deta[2 * i] * scale, out.gamma[2 * i + 1] = deta[2 * i + 1] * scale;
    d_theta += r * (im * cosine - re * sine) * (n * step);
  });
  d_theta = warp_sum(d_theta);
  if (threadIdx.x % 32 == 0) out.theta[d] = d_theta * (kPi * s_theta * (1 - s_theta));
}

}  // namespace

void cema_coefficients(std::int64_t D, std::int64_t N, const float* alpha, const float* delta,
                       const float* theta, const float* gamma, float* p, float* q, float* eta,
                       cudaStream_t stream) {
  if (D == 0) return;
  forward<<<grid_size(ceil_div(D, kWarps)), 32 * kWarps, 0, stream>>>(D, N, alpha, delta, theta, gamma, p, q,
                                                                      eta);
}

void cema_coefficients_backward(std::int64_t D, std::int64_t N, const float* alpha, const float* delta,
                                const float* theta, const float* dp, const float* dq, const float* deta,
                                const CemaParameterGradients& gradients, cudaStream_t stream) {
  if (D == 0) return;
  backward<<<grid_size(ceil_div(D, kWarps)), 32 * kWarps, 0, stream>>>(D, N, alpha, delta, theta, dp, dq,
                                                                       deta, gradients);
}

}  // namespace megalodon::ops::cuda
