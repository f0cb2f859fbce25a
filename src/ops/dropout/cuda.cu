#include "ops/dropout/cuda.h"

#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;

// Philox4x32-10 (base/random.h).
__device__ uint4 philox(std::uint64_t key, std::uint64_t counter) {
  uint4 c{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), 0, 0};
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c.x, b = std::uint64_t{0xCD9E8D57u} * c.z;
    c = {static_cast<std::uint32_t>(b >> 32) ^ c.y ^ k0, static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c.w ^ k1, static_cast<std::uint32_t>(a)};
  }
  return c;
}

// Four elements a thread.
template <class T>
__global__ void drop(const T* x, std::uint64_t key, std::uint32_t threshold, float scale, std::int64_t n,
                     T* y) {
  const std::int64_t block = std::int64_t{blockIdx.x} * kThreads + threadIdx.x, first = 4 * block;
  if (first >= n) return;
  const uint4 c = philox(key, static_cast<std::uint64_t>(block));
  const std::uint32_t words[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (first + j < n)
      y[first + j] = from_float<T>(words[j] >= threshold ? to_float(x[first + j]) * scale : 0);
  }
}

}  // namespace

template <class T>
void dropout(const T* x, std::uint64_t key, std::uint32_t threshold, float scale, std::int64_t n, T* y,
             cudaStream_t stream) {
  if (n == 0) return;
  drop<<<grid_size(ceil_div(n, 4 * kThreads)), kThreads, 0, stream>>>(x, key, threshold, scale, n, y);
}

template void dropout(const float*, std::uint64_t, std::uint32_t, float, std::int64_t, float*, cudaStream_t);
template void dropout(const Bfloat16*, std::uint64_t, std::uint32_t, float, std::int64_t, Bfloat16*,
                      cudaStream_t);

}  // namespace megalodon::ops::cuda
