#include "ops/cast_transposed/cuda.h"

#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kThreads = 256;

// A block turns a tile of kTile x kTile in shared memory: IN elements are read at once, OUT written.
template <int IN, int OUT>
__global__ void __launch_bounds__(kThreads)
    turn(const float* x, std::int64_t M, std::int64_t N, Bfloat16* y) {
  __shared__ float tile[kTile][kTile + 1];
  const std::int64_t first_m = std::int64_t{blockIdx.y} * kTile, first_n = std::int64_t{blockIdx.x} * kTile;
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kTile / IN; i += kThreads) {
    const int m = i / (kTile / IN), n = i % (kTile / IN) * IN;
    if (first_m + m >= M || first_n + n >= N) continue;
    float row[IN];
    load(x + (first_m + m) * N + first_n + n, row);
#pragma unroll
    for (int j = 0; j < IN; ++j) tile[m][n + j] = row[j];
  }
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kTile / OUT; i += kThreads) {
    const int n = i / (kTile / OUT), m = i % (kTile / OUT) * OUT;
    if (first_m + m >= M || first_n + n >= N) continue;
    float column[OUT];
#pragma unroll
    for (int j = 0; j < OUT; ++j) column[j] = tile[m + j][n];
    store(column, y + (first_n + n) * M + first_m + m);
  }
}

}  // namespace

void cast_transposed(const float* x, std::int64_t M, std::int64_t N, Bfloat16* y, cudaStream_t stream) {
  if (M == 0 || N == 0) return;
  const dim3 grid(grid_size(ceil_div(N, kTile)), grid_size(ceil_div(M, kTile)));
  const bool packs = N % 4 == 0 && M % 8 == 0 && reinterpret_cast<std::uintptr_t>(x) % 16 == 0 &&
                     reinterpret_cast<std::uintptr_t>(y) % 16 == 0;
  if (packs) {
    turn<4, 8><<<grid, kThreads, 0, stream>>>(x, M, N, y);
  } else {
    turn<1, 1><<<grid, kThreads, 0, stream>>>(x, M, N, y);
  }
}

}  // namespace megalodon::ops::cuda
