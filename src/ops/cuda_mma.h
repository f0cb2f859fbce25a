#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace megalodon::ops::cuda {

// c [16, 8] += a [16, 16] b [16, 8] in bfloat16, by a warp. Of a the four 8 x 8 quarters, upper left, lower
// left, upper right, lower right; of b, transposed, the upper and the lower half; lane 4 r + c has of c (r, 2
// c), (r, 2 c
// + 1), (r + 8, 2 c), (r + 8, 2 c + 1).
__device__ inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace megalodon::ops::cuda
