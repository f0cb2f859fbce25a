#pragma once
#include <cstdint>

#include "ops/cema/cuda.h"
#include "ops/cema/cuda_warp.h"
#include "ops/cuda_tensor_map.h"

// Boxes of kBoxSteps steps x kCemaTileFeatures features of an array [B, L, D] that the tensor memory
// accelerator copies to shared memory. It keeps many more rows of 32 bytes on their way than loads do. What
// lies outside the array is zero.
namespace megalodon::ops::cuda {

using Boxes = CUtensorMap;
inline constexpr int kBoxSteps = 256;

// In shared memory, at multiples of 256 bytes, the 16-byte halves of steps 4 .. 7 of 8 change places.
inline Boxes make_boxes(const CemaShape& s, const Bfloat16* x) {
  return tensor_map("cema", x,
                    {.sizes = {s.D, s.L, s.B},
                     .strides = {s.D, s.L * s.D},
                     .box = {static_cast<int>(kCemaTileFeatures), kBoxSteps, 1},
                     .swizzle = CU_TENSOR_MAP_SWIZZLE_32B,
                     .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B});
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
