#include "ops/column_sum/cuda.h"

#include "ops/cuda_device.h"
#include "ops/cuda_step.h"

namespace megalodon::ops::cuda {
namespace {

// A block sums `rows` rows of 32 V columns: a warp every W-th row, a lane V columns.
template <class T, int V, int W>
__global__ void __launch_bounds__(32 * W)
    sums(const T* x, std::int64_t R, std::int64_t D, std::int64_t rows, float* y) {
  __shared__ float partial[W][32 * V + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t column = (std::int64_t{blockIdx.x} * 32 + lane) * V, first = blockIdx.y * rows,
                     last = first + rows < R ? first + rows : R;
  float sum[V] = {};
  wait_for_previous();
  if (column < D) {
#pragma unroll 8
    for (std::int64_t row = first + warp; row < last; row += W) {
      float x_i[V];
      load(x + row * D + column, x_i);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += x_i[j];
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) partial[warp][j * 32 + lane] = sum[j];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * V; i += 32 * W) {  // column i of the block's
    const std::int64_t of_y = std::int64_t{blockIdx.x} * 32 * V + i;
    float total = 0;
#pragma unroll
    for (int w = 0; w < W; ++w) total += partial[w][i % V * 32 + i / V];
    if (of_y < D) y[blockIdx.y * D + of_y] = total;
  }
}

}  // namespace

template <class T>
void column_sums(const T* x, std::int64_t R, std::int64_t D, std::int64_t rows, float* y,
                 cudaStream_t stream) {
  with_pack_width<T>(
      D,
      [&]<int V>(Width<V>) {
        const dim3 grid(grid_size(ceil_div(D, 32 * V)), grid_size(ceil_div(R, rows)));
        if (grid.y > 1) {
          launch_step({grid, 32 * 8, 0, stream}, sums<T, V, 8>, x, R, D, rows, y);
        } else {  // few blocks
          launch_step({grid, 32 * 32, 0, stream}, sums<T, V, 32>, x, R, D, rows, y);
        }
      },
      x);
}

template void column_sums(const float*, std::int64_t, std::int64_t, std::int64_t, float*, cudaStream_t);
template void column_sums(const Bfloat16*, std::int64_t, std::int64_t, std::int64_t, float*, cudaStream_t);

}  // namespace megalodon::ops::cuda
