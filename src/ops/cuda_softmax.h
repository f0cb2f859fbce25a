#pragma once
#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {

// The softmax over the keys of a query as a block goes through them, relative to the largest score so far.
struct BlockSoftmax {
  float largest = -INFINITY, total = 0;  // total: the sum of exponentials

  // `weight` [count], the scores of further keys, no more than the block's kWarps * 32 threads, become their
  // exponentials, for all threads to see. Returns the factor that what was summed before is to be taken by.
  template <int kWarps>
  __device__ float add(float* weight, int count) {
    const bool mine = static_cast<int>(threadIdx.x) < count;
    const float score = mine ? weight[threadIdx.x] : -INFINITY,
                now = fmaxf(largest, block_max<kWarps>(score));
    float sums[1] = {mine ? __expf(score - now) : 0};
    if (mine) weight[threadIdx.x] = sums[0];
    block_sum(sums);
    const float kept = __expf(largest - now);
    largest = now, total = total * kept + sums[0];
    return kept;
  }
};

}  // namespace megalodon::ops::cuda
