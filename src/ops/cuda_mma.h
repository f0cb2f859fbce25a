#pragma once
#include <cuda_bf16.h>
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

// Matrices of 8 x 8 elements of 16 bits, by a warp: lane 4 r + c has elements (r, 2 c) and (r, 2 c + 1) as a
// word. Four matrices; lane 8 i + r gives the address of row r, 16 bytes, of matrix i. kTransposed: the
// matrices in memory are the transposed of those in the lanes.
template <bool kTransposed>
__device__ inline void load_matrices(std::uint32_t (&to)[4], std::uint32_t address) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
}
template <bool kTransposed>
__device__ inline void store_matrices(const std::uint32_t (&from)[4], std::uint32_t address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static_assert(!kTransposed);
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) {
    const std::uint32_t row = __shfl_sync(~0u, address, 8 * i + lane / 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(row + lane % 4 * 4), "r"(from[i]) : "memory");
  }
  return;
#endif
  if constexpr (kTransposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(from[0]),
                 "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
  }
}

// Lane 4 r + c gets the sum of the r-th numbers of all lanes with the same c.
__device__ inline float sum_of_lanes(float (&x)[8]) {
#pragma unroll
  for (int rows = 4; rows > 0; rows /= 2) {
    const bool upper = threadIdx.x & 4 * rows;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const float mine = upper ? x[i + rows] : x[i], other = upper ? x[i] : x[i + rows];
      x[i] = mine + __shfl_xor_sync(~0u, other, 4 * rows);
    }
  }
  return x[0];
}

// A matrix of 8 x 8 from lane to lane.
__device__ inline std::uint32_t transposed(std::uint32_t word) {
  std::uint32_t to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(word));
  return to;
}

// The sums and the products of two pairs of bfloat16 numbers.
__device__ inline std::uint32_t add_pairs(std::uint32_t a, std::uint32_t b) {
  std::uint32_t to;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(to) : "r"(a), "r"(b));
  return to;
}
__device__ inline std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b) {
  std::uint32_t to;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(to) : "r"(a), "r"(b));
  return to;
}

// Two numbers as bfloat16 in a word, the first in its lower half.
__device__ inline std::uint32_t pack(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const std::uint32_t*>(&both);
}
// The two numbers of such a word.
__device__ inline float low(std::uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ inline float high(std::uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000);
}

}  // namespace megalodon::ops::cuda
