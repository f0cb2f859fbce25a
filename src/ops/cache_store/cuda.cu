#include "ops/cache_store/cuda.h"

#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;

// A thread a pack of V numbers.
template <class T, int V>
__global__ void store_rows(const T* values, const std::int64_t* start, std::int64_t B, std::int64_t L,
                           std::int64_t kept, std::int64_t C, std::int64_t width, T* cache) {
  const std::int64_t packs = width / V, i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= B * kept * packs) return;
  const std::int64_t b = i / (kept * packs), t = L - kept + i / packs % kept, column = i % packs * V;
  float row[V];
  load(values + (b * L + t) * width + column, row);
  store(row, cache + (b * C + (start[b] + t) % C) * width + column);
}

}  // namespace

template <class T>
void cache_store(const T* values, const std::int64_t* start, std::int64_t B, std::int64_t L,
                 std::int64_t kept, std::int64_t C, std::int64_t width, T* cache, cudaStream_t stream) {
  with_pack_width<T>(
      width,
      [&]<int V>(Width<V>) {
        store_rows<T, V><<<grid_size(ceil_div(B * kept * (width / V), kThreads)), kThreads, 0, stream>>>(
            values, start, B, L, kept, C, width, cache);
      },
      values, cache);
}

template void cache_store(const float*, const std::int64_t*, std::int64_t, std::int64_t, std::int64_t,
                          std::int64_t, std::int64_t, float*, cudaStream_t);
template void cache_store(const Bfloat16*, const std::int64_t*, std::int64_t, std::int64_t, std::int64_t,
                          std::int64_t, std::int64_t, Bfloat16*, cudaStream_t);

}  // namespace megalodon::ops::cuda
