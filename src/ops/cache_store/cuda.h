#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/bfloat16.h"

namespace megalodon::ops::cuda {

inline constexpr int kMostCacheStores = 2;  // of a launch

// The last `kept` of L positions of each of B rows, `width` numbers each, into a ring of C slots.
template <class T>
struct CacheStore {
  const T* values;              // [B, L, width]
  T* cache;                     // [B, C, width]
  std::int64_t row_step, step;  // of values, from row to row and position to position, in elements
  std::int64_t kept, C, width;
};
template <class T>
struct CacheStores {
  CacheStore<T> store[kMostCacheStores];
  int count;
  const std::int64_t* start;  // [B]
  std::int64_t B, L;
};
template <class T>
void cache_store(const CacheStores<T>& stores, cudaStream_t stream);

}  // namespace megalodon::ops::cuda
