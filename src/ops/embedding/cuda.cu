#include "ops/cuda_device.h"
#include "ops/embedding/cuda.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 4;  // of a warp

__global__ void __launch_bounds__(kWarps * 32)
    gather(const uint4* table, const std::int64_t* tokens, std::int64_t N, std::int64_t V, std::int64_t packs,
           uint4* y) {
  const std::int64_t first = (std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * kRows;
  if (first >= N) return;
  const uint4* from[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const std::int64_t token = tokens[first + r < N ? first + r : N - 1];
    if (token < 0 || token >= V) __trap();
    from[r] = table + token * packs;
  }
  for (std::int64_t i = threadIdx.x % 32; i < packs; i += 32) {
    uint4 pack[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) pack[r] = __ldg(from[r] + i);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (first + r < N) y[(first + r) * packs + i] = pack[r];
  }
}

constexpr int kAtOnce = 32;  // rows that are read before the first is added

// A warp: 32 W columns of `rows` rows. Each lane adds to its own columns of the sums, so that no two meet.
template <int W>
__global__ void __launch_bounds__(32) sums(const float* x, const std::int64_t* tokens, std::int64_t N,
                                           std::int64_t D, std::int64_t V, std::int64_t rows, float* y) {
  extern __shared__ float4 memory[];
  float* const of_lane = reinterpret_cast<float*>(memory) + threadIdx.x * W;  // token v at 32 W v
  const std::int64_t column = (std::int64_t{blockIdx.x} * 32 + threadIdx.x) * W, first = blockIdx.y * rows,
                     last = first + rows < N ? first + rows : N;
  if (column >= D) return;
  const float zero[W] = {};
  for (std::int64_t v = 0; v < V; ++v) store(zero, of_lane + 32 * W * v);
  for (std::int64_t row = first; row < last; row += kAtOnce) {
    float x_i[kAtOnce][W];
    int token[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row + i >= last) continue;
      token[i] = static_cast<int>(tokens[row + i]);
      load(x + (row + i) * D + column, x_i[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row + i >= last) continue;
      float sum[W];
      load(of_lane + 32 * W * token[i], sum);
#pragma unroll
      for (int j = 0; j < W; ++j) sum[j] += x_i[i][j];
      store(sum, of_lane + 32 * W * token[i]);
    }
  }
  for (std::int64_t v = 0; v < V; ++v) {
    float sum[W];
    load(of_lane + 32 * W * v, sum);
    store(sum, y + (blockIdx.y * V + v) * D + column);
  }
}

}  // namespace

void chosen_rows(const void* table, const std::int64_t* tokens, std::int64_t N, std::int64_t V,
                 std::int64_t bytes, void* y, cudaStream_t stream) {
  if (N == 0) return;
  gather<<<grid_size(ceil_div(N, kWarps * kRows)), kWarps * 32, 0, stream>>>(
      static_cast<const uint4*>(table), tokens, N, V, bytes / 16, static_cast<uint4*>(y));
}

void sums_by_token(const float* x, const std::int64_t* tokens, std::int64_t N, std::int64_t D, std::int64_t V,
                   std::int64_t rows, float* y, cudaStream_t stream) {
  const auto launch = [&]<int W>(Width<W>) {
    const auto shared = static_cast<std::size_t>(V) * 32 * W * sizeof(float);
    if (shared > most_shared_memory()) return false;
    allow_shared_memory(sums<W>, shared);
    const dim3 grid(grid_size(ceil_div(D, 32 * W)), grid_size(ceil_div(N, rows)));
    sums<W><<<grid, 32, shared, stream>>>(x, tokens, N, D, V, rows, y);
    return true;
  };
  const auto bits = reinterpret_cast<std::uintptr_t>(x) | reinterpret_cast<std::uintptr_t>(y);
  if (D % 2 != 0 || bits % 8 != 0 || !launch(Width<2>{})) launch(Width<1>{});
}

}  // namespace megalodon::ops::cuda
