#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "ops/cuda_device.h"

// The kernels of a decoding step are short and each needs what the one before it made. Launched with
// launch_step one may start while its predecessor still runs: what it does before wait_for_previous()
// overlaps with that one's end. Until then it may read nothing that the few kernels before it wrote, and must
// write nothing.
namespace megalodon::ops::cuda {

// From here on, once all blocks have come here, the successor may start. A kernel that holds little of a
// multiprocessor lets it start at once, beside the predecessor too.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the predecessor has ended, and with it all kernels before it.
__device__ inline void wait_for_end_of_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void wait_for_previous() {
  wait_for_end_of_previous();
  let_next_start();
}

__device__ inline void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Arrives at the barrier below where nothing was written that others read.
__device__ inline void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
// A barrier of a cluster in two parts; before Hopper a block is its own cluster. What the cluster's threads
// wrote to their blocks' shared memory before they arrived, they read of each other's after the wait. (By
// default a barrier of a cluster waits for what was written to global memory too.)
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
#endif
  cluster_arrive_relaxed();
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#else
  __syncthreads();
#endif
}
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// Where another block of the cluster has in its shared memory what this one has at `mine`.
__device__ inline std::uint32_t address_in_block(const void* mine, unsigned block) {
  const auto local = static_cast<std::uint32_t>(__cvta_generic_to_shared(mine));
  std::uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(block));
  return remote;
}
__device__ inline double2 read_of_block(const double2* mine, unsigned block) {
#if __CUDA_ARCH__ >= 900
  double2 value;
  asm volatile("ld.shared::cluster.v2.f64 {%0, %1}, [%2];"
               : "=d"(value.x), "=d"(value.y)
               : "r"(address_in_block(mine, block))
               : "memory");
  return value;
#else
  return *mine;
#endif
}

inline bool is_hopper() {
  static const bool yes = [] {
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 9;
  }();
  return yes;
}

// Blocks of a kernel that the current device holds at once.
template <class... P>
std::int64_t resident_blocks(void (*kernel)(P...), unsigned threads, std::size_t shared_bytes) {
  int blocks = 0;  // of a multiprocessor
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads), shared_bytes);
  return multiprocessors() * blocks;
}

struct StepLaunch {
  dim3 grid;
  unsigned threads;
  std::size_t shared_bytes;
  cudaStream_t stream;
  unsigned cluster = 1;  // blocks, along z
};

template <class... P, class... A>
void launch_step(const StepLaunch& launch, void (*kernel)(P...), A&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = launch.cluster;
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = !is_hopper() ? 0 : launch.cluster > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...);
}

}  // namespace megalodon::ops::cuda
