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

// A block is blockDim.y rows of blockDim.x threads; of more threads than a warp there is one row.
__device__ std::int64_t row_of_thread() {
  return std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
}

// With a = logsumexp of the other logits less the target's, nll = log(1 + e^a): accurate where the target is
// nearly sure.
template <class E, int W>
__global__ void forward(const E* logits, const std::int64_t* targets, std::int64_t ignored, LogitRows rows,
                        float* nll) {
  const std::int64_t row = row_of_thread(), V = rows.V;
  if (row >= rows.T) return;
  const std::int64_t target = targets[row];
  if (target == ignored) {
    if (threadIdx.x == 0) nll[row] = 0;
    return;
  }
  logits += row * rows.row;
  Exponentials mine{-INFINITY, 0};
  for (std::int64_t i = threadIdx.x * W; i < V; i += blockDim.x * W) {
    float v[W];
    load(logits + i, v);
    Exponentials some{-INFINITY, 0};
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if (i + j == target || i + j >= V) v[j] = -INFINITY;
      some.largest = fmaxf(some.largest, v[j]);
    }
#pragma unroll
    for (int j = 0; j < W; ++j) some.sum += v[j] == -INFINITY ? 0 : __expf(v[j] - some.largest);
    mine = join(mine, some);
  }
  mine = warp_join(mine);
  if (blockDim.x > 32) {
    __shared__ Exponentials warps[32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    mine = warp_join(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : Exponentials{-INFINITY, 0});
  }
  if (threadIdx.x != 0) return;
  const bool known = target >= 0 && target < V;
  const float a = known ? mine.largest + logf(mine.sum) - to_float(logits[target]) : NAN;
  nll[row] = a > 0 ? a + log1pf(expf(-a)) : log1pf(expf(a));
}

// d_logits = (softmax - [the target]) d_nll; logsumexp = nll + the target's logit, and the target's softmax
// is e^-nll.
template <class E, int W>
__global__ void backward(const E* logits, const std::int64_t* targets, std::int64_t ignored, const float* nll,
                         const float* d_nll, LogitRows rows, E* d_logits) {
  const std::int64_t row = row_of_thread(), V = rows.V;
  if (row >= rows.T) return;
  const std::int64_t target = targets[row];
  logits += row * rows.row, d_logits += row * rows.row;
  const bool counts = target != ignored, known = target >= 0 && target < V;
  const float logsumexp = known ? nll[row] + to_float(logits[target]) : NAN, d = d_nll[row];
  for (std::int64_t i = threadIdx.x * W; i < rows.row; i += blockDim.x * W) {
    float v[W];
    load(logits + i, v);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float slope = i + j == target ? expm1f(-nll[row]) : __expf(v[j] - logsumexp);
      v[j] = counts && i + j < V ? slope * d : 0;
    }
    store(v, d_logits + i);
  }
}

// launch(Width<W>{}, grid, block) for W elements a thread at once: of short rows several a block.
template <class E, class F, class... P>
void with_layout(const LogitRows& rows, F&& launch, const P*... pointers) {
  if (rows.T == 0) return;
  with_pack_width<E>(
      rows.row,
      [&]<int W>(Width<W> width) {
        const std::int64_t packs = ceil_div(rows.row, W);
        const dim3 block = packs <= 128 ? dim3(32, 8) : dim3(threads_for(packs));
        launch(width, grid_size(ceil_div(rows.T, block.y)), block);
      },
      pointers...);
}

}  // namespace

template <class E>
void cross_entropy_forward(const E* logits, const std::int64_t* targets, std::int64_t ignored,
                           const LogitRows& rows, float* nll, cudaStream_t stream) {
  with_layout<E>(
      rows,
      [&]<int W>(Width<W>, unsigned grid, dim3 block) {
        forward<E, W><<<grid, block, 0, stream>>>(logits, targets, ignored, rows, nll);
      },
      logits);
}

template <class E>
void cross_entropy_backward(const E* logits, const std::int64_t* targets, std::int64_t ignored,
                            const float* nll, const float* d_nll, const LogitRows& rows, E* d_logits,
                            cudaStream_t stream) {
  with_layout<E>(
      rows,
      [&]<int W>(Width<W>, unsigned grid, dim3 block) {
        backward<E, W><<<grid, block, 0, stream>>>(logits, targets, ignored, nll, d_nll, rows, d_logits);
      },
      logits, d_logits);
}

template void cross_entropy_forward(const float*, const std::int64_t*, std::int64_t, const LogitRows&, float*,
                                    cudaStream_t);
template void cross_entropy_forward(const Bfloat16*, const std::int64_t*, std::int64_t, const LogitRows&,
                                    float*, cudaStream_t);
template void cross_entropy_backward(const float*, const std::int64_t*, std::int64_t, const float*,
                                     const float*, const LogitRows&, float*, cudaStream_t);
template void cross_entropy_backward(const Bfloat16*, const std::int64_t*, std::int64_t, const float*,
                                     const float*, const LogitRows&, Bfloat16*, cudaStream_t);

}  // namespace megalodon::ops::cuda
