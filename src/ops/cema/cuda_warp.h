#pragma once
#include <cuda_bf16.h>

#include <cstdint>
#include "ops/cuda_mma.h"

// Instructions of a whole warp that CUDA C++ has no names for. In matrices of 8 x 8 elements of 16 bits, lane
// 4 r + c has elements (r, 2 c) and (r, 2 c + 1) as a word.
namespace megalodon::ops::cuda {

// Four matrices; lane 8 i + r gives the address of row r, 16 bytes, of matrix i. kTransposed: the matrices in
// memory are the transposed of those in the lanes.
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

// Two numbers as bfloat16 in a word, the first in its lower half.
__device__ inline std::uint32_t pack(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const std::uint32_t*>(&both);
}

// a and b as sums of two bfloat16 numbers each, packed.
__device__ inline void split(float a, float b, std::uint32_t& high, std::uint32_t& low) {
  high = pack(a, b);
  low = pack(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000));
}

}  // namespace megalodon::ops::cuda
