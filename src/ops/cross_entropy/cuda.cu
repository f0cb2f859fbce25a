#include "ops/cross_entropy/cuda.h"
#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

// The logarithm of a sum of exponentials, as the largest exponent and the sum relative to it.
struct Exponentials {
  float largest, sum;
};

__device__ Exponentials join(Exponentials a, Exponentials b) {
  const float largest = fmaxf(a.largest, b.largest);
  if (largest == -INFINITY) return {largest, 0};
  return {largest, a.sum * __expf(a.largest - largest) + b.sum * __expf(b.largest - largest)};
}

__device__ Exponentials warp_join(Exponentials e) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    e = join(e, {__shfl_xor_sync(~0u, e.largest, offset), __shfl_xor_sync(~0u, e.sum, offset)});
  return e;
}

// A block a row. With a = logsumexp of the other logits less the target's, nll = log(1 + e^a): accurate where
// the target is nearly sure.
template <class E, int W>
__global__ void forward(const E* logits, const std::int64_t* targets, std::int64_t ignored, std::int64_t V,
                        float* nll) {
  const std::int64_t row = blockIdx.x, target = targets[row];
  if (target == ignored) {
    if (threadIdx.x == 0) nll[row] = 0;
    return;
  }
  logits += row * V;
  Exponentials mine{-INFINITY, 0};
  for (std::int64_t i = threadIdx.x * W; i < V; i += blockDim.x * W) {
    float v[W];
    load(logits + i, v);
    Exponentials some{-INFINITY, 0};
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if (i + j == target) v[j] = -INFINITY;
      some.largest = fmaxf(some.largest, v[j]);
    }
#pragma unroll
    for (int j = 0; j < W; ++j) some.sum += v[j] == -INFINITY ? 0 : __expf(v[j] - some.largest);
    mine = join(mine, some);
  }
  __shared__ Exponentials warps[32];
  mine = warp_join(mine);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  mine = warp_join(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : Exponentials{-INFINITY, 0});
  if (threadIdx.x != 0) return;
  const bool known = target >= 0 && target < V;
  const float a = known ? mine.largest + logf(mine.sum) - to_float(logits[target]) : NAN;
  nll[row] = a > 0 ? a + log1pf(expf(-a)) : log1pf(expf(a));
}

// d_logits = (softmax - [the target]) d_nll; logsumexp = nll + the target's logit, and the target's softmax
// is e^-nll.
template <class E, int W>
__global__ void backward(const E* logits, const std::int64_t* targets, std::int64_t ignored, const float* nll,
                         const float* d_nll, std::int64_t V, E* d_logits) {
  const std::int64_t row = blockIdx.x, target = targets[row];
  logits += row * V, d_logits += row * V;
  const bool counts = target != ignored, known = target >= 0 && target < V;
  const float logsumexp = known ? nll[row] + to_float(logits[target]) : NAN, d = d_nll[row];
  for (std::int64_t i = threadIdx.x * W; i < V; i += blockDim.x * W) {
    float v[W];
    load(logits + i, v);
#pragma unroll
    for (int j = 0; j < W; ++j)
      v[j] = counts ? (i + j == target ? expm1f(-nll[row]) : __expf(v[j] - logsumexp)) * d : 0;
    store(v, d_logits + i);
  }
}

}  // namespace

template <class E>
void cross_entropy_forward(const E* logits, const std::int64_t* targets, std::int64_t ignored, std::int64_t T,
                           std::int64_t V, float* nll, cudaStream_t stream) {
  if (T == 0) return;
  with_pack_width<E>(
      V,
      [&]<int W>(Width<W>) {
        forward<E, W>
            <<<grid_size(T), threads_for(ceil_div(V, W)), 0, stream>>>(logits, targets, ignored, V, nll);
      },
      logits);
}

template <class E>
void cross_entropy_backward(const E* logits, const std::int64_t* targets, std::int64_t ignored,
                            const float* nll, const float* d_nll, std::int64_t T, std::int64_t V, E* d_logits,
                            cudaStream_t stream) {
  if (T == 0) return;
  with_pack_width<E>(
      V,
      [&]<int W>(Width<W>) {
        backward<E, W><<<grid_size(T), threads_for(ceil_div(V, W)), 0, stream>>>(logits, targets, ignored,
                                                                                 nll, d_nll, V, d_logits);
      },
      logits, d_logits);
}

template void cross_entropy_forward(const float*, const std::int64_t*, std::int64_t, std::int64_t,
                                    std::int64_t, float*, cudaStream_t);
template void cross_entropy_forward(const Bfloat16*, const std::int64_t*, std::int64_t, std::int64_t,
                                    std::int64_t, float*, cudaStream_t);
template void cross_entropy_backward(const float*, const std::int64_t*, std::int64_t, const float*,
                                     const float*, std::int64_t, std::int64_t, float*, cudaStream_t);
template void cross_entropy_backward(const Bfloat16*, const std::int64_t*, std::int64_t, const float*,
                                     const float*, std::int64_t, std::int64_t, Bfloat16*, cudaStream_t);

}  // namespace megalodon::ops::cuda
