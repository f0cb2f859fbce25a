#include "ops/cache_store/cuda.h"

#include <algorithm>
#include <numeric>

#include "ops/cuda_device.h"

namespace megalodon::ops::cuda {
namespace {

constexpr int kThreads = 256;

// A thread a pack of V numbers; blockIdx.y: the store.
template <class T, int V>
__global__ void store_rows(const __grid_constant__ CacheStores<T> stores) {
  const CacheStore<T>& s = stores.store[blockIdx.y];
  const std::int64_t packs = s.width / V, i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= stores.B * s.kept * packs) return;
  const std::int64_t b = i / (s.kept * packs), t = stores.L - s.kept + i / packs % s.kept,
                     column = i % packs * V;
  float row[V];
  load(s.values + b * s.row_step + t * s.step + column, row);
  store(row, s.cache + (b * s.C + (stores.start[b] + t) % s.C) * s.width + column);
}

}  // namespace

template <class T>
void cache_store(const CacheStores<T>& stores, cudaStream_t stream) {
  const auto& [first, second] = stores.store;
  std::int64_t common = 0, most = 0;  // what divides widths and steps; numbers of a store
  for (int i = 0; i < stores.count; ++i) {
    const auto& s = stores.store[i];
    common = std::gcd(std::gcd(common, s.width), std::gcd(s.row_step, s.step));
    most = std::max(most, stores.B * s.kept * s.width);
  }
  if (most == 0) return;
  with_pack_width<T>(
      common,
      [&]<int V>(Width<V>) {
        const dim3 grid(grid_size(ceil_div(most / V, kThreads)), static_cast<unsigned>(stores.count));
        store_rows<T, V><<<grid, kThreads, 0, stream>>>(stores);
      },
      first.values, first.cache, second.values, second.cache);
}

template void cache_store(const CacheStores<float>&, cudaStream_t);
template void cache_store(const CacheStores<Bfloat16>&, cudaStream_t);

}  // namespace megalodon::ops::cuda
