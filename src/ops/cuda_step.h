#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

// The kernels of a decoding step are short and each needs what the one before it made. Launched with
// launch_step one may start while its predecessor still runs: what it does before wait_for_previous()
// overlaps with that one's end. Until then it may read all that the kernels before its predecessor wrote, but
// nothing of the predecessor's, and must write nothing.
namespace megalodon::ops::cuda {

// The successor starts no earlier than here, so that never more than two kernels overlap.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
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
  int device = 0, processors = 0, blocks = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads), shared_bytes);
  return std::int64_t{processors} * blocks;
}

struct StepLaunch {
  dim3 grid;
  unsigned threads;
  std::size_t shared_bytes;
  cudaStream_t stream;
};

template <class... P, class... A>
void launch_step(const StepLaunch& launch, void (*kernel)(P...), A&&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = is_hopper() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...);
}

}  // namespace megalodon::ops::cuda
