#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

#include "ops/cema/cuda.h"
#include "ops/cema/cuda_warp.h"

// Boxes of kBoxSteps steps x kCemaTileFeatures features of an array [B, L, D] that the tensor memory
// accelerator copies to shared memory. It keeps many more rows of 32 bytes on their way than loads do. What
// lies outside the array is zero.
namespace megalodon::ops::cuda {

using Boxes = CUtensorMap;
inline constexpr int kBoxSteps = 256;

// In shared memory, at multiples of 256 bytes, the 16-byte halves of steps 4 .. 7 of 8 change places.
inline Boxes make_boxes(const CemaShape& s, const Bfloat16* x) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const auto D = static_cast<cuuint64_t>(s.D), L = static_cast<cuuint64_t>(s.L);
  const cuuint64_t sizes[3] = {D, L, static_cast<cuuint64_t>(s.B)};
  const cuuint64_t strides[2] = {D * sizeof(Bfloat16), L * D * sizeof(Bfloat16)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(kCemaTileFeatures), kBoxSteps, 1}, every[3] = {1, 1, 1};
  Boxes boxes;
  if (encode == nullptr ||
      encode(&boxes, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<Bfloat16*>(x), sizes, strides, box,
             every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    throw std::runtime_error("[cema] no tensor map for x: the CUDA driver is too old for this device");
  return boxes;
}

// Where a thread block waits for its boxes.
struct Barrier {
  std::uint64_t state;

  // By one thread, which may start copies then; the others after __syncthreads.
  __device__ void start() {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&state)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __device__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                 : "memory");
  }
  // For what was expected first (parity 0), second (1), third (0), ..
  __device__ void wait(int parity) const {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }
};

__device__ inline void copy_box(const Boxes& from, int feature, int step, int sequence, std::uint32_t to,
                                const Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(&from), "r"(feature), "r"(step), "r"(sequence), "r"(shared_address(&barrier.state))
      : "memory");
}

}  // namespace megalodon::ops::cuda
