#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "ops/bfloat16.h"
#include "ops/cuda_barrier.h"

// Hopper's own instructions: copies of tiles by the copy engine (TMA), products of a warpgroup (wgmma). Tiles
// in shared memory are rows of 64 bfloat16, 128 bytes, in the engine's 128-byte swizzle, and begin at
// multiples of 1024 bytes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "for GPUs of compute capability 9.0 compile with CMAKE_CUDA_ARCHITECTURES=90a-real"
#endif

namespace megalodon::ops::cuda {

// Whether this pass of the compiler may use them: a kernel has no code for other GPUs.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kForHopper = true;
#else
inline constexpr bool kForHopper = false;
#endif

// Whether this build has that code and the current device is one for it.
inline bool has_hopper_code() {
  constexpr int kCompiled[] = {__CUDA_ARCH_LIST__};
  if (std::find(std::begin(kCompiled), std::end(kCompiled), 900) == std::end(kCompiled)) return false;
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
}

// The map itself, for copies that come later.
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// A box of the array of `map`, from these places of its dimensions on, the innermost first.
__device__ inline void copy_box(void* to, const CUtensorMap& map, int i, int j, int k, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(to)),
      "l"(&map), "r"(i), "r"(j), "r"(k), "r"(shared_address(&barrier))
      : "memory");
}
// And back from shared memory, what lies in the array; commit_copies_back() follows.
__device__ inline void copy_box_back(const CUtensorMap& map, int i, int j, int k, const void* from) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map),
               "r"(i), "r"(j), "r"(k), "r"(shared_address(from))
               : "memory");
}
// Of the matrix of `map` (matrix_map): rows from `row` on, 64 columns from 64 `block` on.
__device__ inline void copy_tile(void* to, const CUtensorMap& map, int row, int block, Barrier& barrier) {
  copy_box(to, map, 0, row, block, barrier);
}
__device__ inline void copy_tile_back(const CUtensorMap& map, int row, int block, const void* from) {
  copy_box_back(map, 0, row, block, from);
}

// Where a number of stages that follow one another in a ring goes, and its phase of the barriers there.
template <int kStages>
struct RingPlace {
  int stage, phase;

  __device__ explicit RingPlace(int number) : stage(number % kStages), phase(number / kStages) {}
  __device__ void advance() {
    if (++stage == kStages) stage = 0, ++phase;
  }
};

// A matrix in shared memory as wgmma takes it, with the 16 numbers in depth that begin at 16 `step` of a tile
// of 64. Its rows are the tile's rows (64 in depth each); transposed, they are the tile's columns, and
// further 64 columns are in the next tile of 64 rows.
template <bool kTransposed>
__device__ inline std::uint64_t operand(const void* tile, int step) {
  constexpr std::uint64_t kSwizzle = std::uint64_t{1} << 62, kEightRows = std::uint64_t{1024 >> 4} << 32;
  constexpr std::uint64_t kNextTile = std::uint64_t{kTransposed ? 64 * 128 >> 4 : 1} << 16;
  const std::uint32_t address = shared_address(tile) + step * 16 * (kTransposed ? 128 : 2);
  return kSwizzle | kEightRows | kNextTile | (address >> 4 & 0x3fff);
}

__device__ inline void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `kLeft` committed groups of products are under way.
template <int kLeft>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// d [64, N] = a [64, 16] b [16, N] (+ d), N twice the length of d. The thread's numbers: those of rows
// 16 w + l / 4 (+ 8 for every second pair) of warp w and lane l, columns 8 j + l % 4 * 2 (+ 1).
#define MEGALODON_FLOATS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MEGALODON_FLOATS_16(d, i)                                                       \
  MEGALODON_FLOATS_4(d, i), MEGALODON_FLOATS_4(d, i + 4), MEGALODON_FLOATS_4(d, i + 8), \
      MEGALODON_FLOATS_4(d, i + 12)
template <bool kTransposeA, bool kTransposeB>
__device__ inline void multiply(float (&d)[16], std::uint64_t a, std::uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p, 1, 1, %19, %20;\n}\n"
      : MEGALODON_FLOATS_16(d, 0)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeA), "n"(kTransposeB));
}
template <bool kTransposeA, bool kTransposeB>
__device__ inline void multiply(float (&d)[64], std::uint64_t a, std::uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, %67, %68;\n}\n"
      : MEGALODON_FLOATS_16(d, 0), MEGALODON_FLOATS_16(d, 16), MEGALODON_FLOATS_16(d, 32),
        MEGALODON_FLOATS_16(d, 48)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeA), "n"(kTransposeB));
}
template <bool kTransposeA, bool kTransposeB>
__device__ inline void multiply(float (&d)[96], std::uint64_t a, std::uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
      "%96, %97, p, 1, 1, %99, %100;\n}\n"
      : MEGALODON_FLOATS_16(d, 0), MEGALODON_FLOATS_16(d, 16), MEGALODON_FLOATS_16(d, 32),
        MEGALODON_FLOATS_16(d, 48), MEGALODON_FLOATS_16(d, 64), MEGALODON_FLOATS_16(d, 80)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeA), "n"(kTransposeB));
}
template <bool kTransposeA, bool kTransposeB>
__device__ inline void multiply(float (&d)[128], std::uint64_t a, std::uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p, 1, 1, %131, %132;\n}\n"
      : MEGALODON_FLOATS_16(d, 0), MEGALODON_FLOATS_16(d, 16), MEGALODON_FLOATS_16(d, 32),
        MEGALODON_FLOATS_16(d, 48), MEGALODON_FLOATS_16(d, 64), MEGALODON_FLOATS_16(d, 80),
        MEGALODON_FLOATS_16(d, 96), MEGALODON_FLOATS_16(d, 112)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeA), "n"(kTransposeB));
}
#undef MEGALODON_FLOATS_16
#undef MEGALODON_FLOATS_4

// Registers of a thread, for all of a warpgroup: fewer for those that only copy, more for those that
// multiply.
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Of named barrier `id` (1 to 15), for `threads` threads: wait, or arrive without waiting.
__device__ inline void named_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Waits too; whether `so` holds for any of the threads.
__device__ inline bool named_any(int id, int threads, bool so) {
  int any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.b32 p, %3, 0;\n"
      "barrier.cta.red.or.pred q, %1, %2, p;\nselp.s32 %0, 1, 0, q;\n}\n"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(so))
      : "memory");
  return any != 0;
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace megalodon::ops::cuda
