#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ops/bfloat16.h"

// What the CUDA kernels share: numbers in memory, in packs of 16 bytes where they lie so, and sums over a
// block.
namespace megalodon::ops::cuda {

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(Bfloat16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline Bfloat16 from_float<Bfloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T value[V];
};

template <int V, class T>
__device__ inline void unpack(const Pack<T, V>& pack, float (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = to_float(pack.value[i]);
}
// By words of two: an instruction for each number.
template <int V>
  requires(V % 2 == 0)
__device__ inline void unpack(const Pack<Bfloat16, V>& pack, float (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; i += 2) {
    const std::uint32_t word = reinterpret_cast<const std::uint32_t*>(pack.value)[i / 2];
    to[i] = __uint_as_float(word << 16), to[i + 1] = __uint_as_float(word & 0xffff0000);
  }
}
// 16 bytes, words until they are unpacked: of elements the compiler would keep each by itself. Read past the
// first cache, which does not see what other blocks write.
__device__ inline uint4 read_pack(const void* from) {
  return __ldcg(static_cast<const uint4*>(from));
}
template <class T>
__device__ inline void unpack(const uint4& pack, float (&to)[16 / sizeof(T)]) {
  const unsigned word[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = __uint_as_float(word[i]);
    } else {
      to[2 * i] = __uint_as_float(word[i] << 16), to[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  }
}
template <int V, class T>
__device__ inline Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
// V neighbouring elements, as float.
template <int V, class T>
__device__ inline void load(const T* from, float (&to)[V]) {
  unpack(load_pack<V>(from), to);
}
template <int V, class T>
__device__ inline void store(const float (&from)[V], T* to) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.value[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

template <int V>
struct Width {
  static constexpr int value = V;
};

// Calls f(Width<V>{}) with the elements of a 16-byte pack where rows of D elements of T at all of `pointers`
// (null or not) can be read in packs, else with 1.
template <class T, class F, class... P>
void with_pack_width(std::int64_t D, F&& f, const P*... pointers) {
  constexpr int V = 16 / sizeof(T);
  const auto bits = (std::uintptr_t{0} | ... | reinterpret_cast<std::uintptr_t>(pointers));
  if (D % V == 0 && bits % 16 == 0) {
    f(Width<V>{});
  } else {
    f(Width<1>{});
  }
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
inline unsigned grid_size(std::int64_t blocks, std::int64_t most = 0x7fffffff) {
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// Of the current device.
inline std::int64_t multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Threads for a row of `items`: whole warps, at most 256.
inline unsigned threads_for(std::int64_t items) {
  return static_cast<unsigned>(items >= 256 ? 256 : ceil_div(items, 32) * 32);
}

// Bytes of shared memory that a block of the current device may have.
inline std::size_t most_shared_memory() {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<std::size_t>(most);
}
// More than 48 KB of it, dynamic and static, must be asked for.
template <class Kernel>
void allow_shared_memory(Kernel kernel, std::size_t bytes) {
  if (bytes > 32 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
// The same of a kernel whose blocks shall fill a multiprocessor: all of its memory is to be shared memory.
template <class Kernel>
void allow_all_shared_memory(Kernel kernel, std::size_t bytes) {
  allow_shared_memory(kernel, bytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                       cudaSharedmemCarveoutMaxShared);
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The largest over a block of kWarps whole warps.
template <int kWarps>
__device__ inline float block_max(float x) {
  __shared__ float of_warp[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) x = fmaxf(x, of_warp[i]);
  __syncthreads();
  return x;
}

// Each value becomes its sum over the block's threads (whole warps), in an order that depends on their number
// alone.
template <int K>
__device__ inline void block_sum(float (&values)[K]) {
  __shared__ float partial[K][32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    values[k] = warp_sum(values[k]);
    if (lane == 0) partial[k][warp] = values[k];
  }
  __syncthreads();
  unsigned width = 1;  // of the lanes that hold a partial sum
  while (width < warps) width *= 2;
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = lane % width < warps ? partial[k][lane % width] : 0;
  for (unsigned offset = width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] += __shfl_xor_sync(~0u, values[k], offset);
  }
  __syncthreads();
}

}  // namespace megalodon::ops::cuda
