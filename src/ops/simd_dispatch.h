#pragma once
#include <hwy/highway.h>

// Kernels are compiled for the baseline, AVX2 and AVX-512 (HWY_DISABLED_TARGETS in CMakeLists.txt leaves out
// the rest). MEGALODON_DISPATCH(f) is the address of the best one for this processor; unlike
// HWY_DYNAMIC_DISPATCH it takes templates and needs nothing of Highway's compiled library. Use it inside #if
// HWY_ONCE, in namespace megalodon::ops::*.
#if HWY_ARCH_X86
#define MEGALODON_DISPATCH(...)                                          \
  (::megalodon::ops::simd_level() == ::megalodon::ops::SimdLevel::avx512 \
       ? &::megalodon::ops::N_AVX3::__VA_ARGS__                          \
   : ::megalodon::ops::simd_level() == ::megalodon::ops::SimdLevel::avx2 \
       ? &::megalodon::ops::N_AVX2::__VA_ARGS__                          \
       : &::megalodon::ops::HWY_NAMESPACE::__VA_ARGS__)
#else
#define MEGALODON_DISPATCH(...) (&::megalodon::ops::HWY_NAMESPACE::__VA_ARGS__)
#endif

namespace megalodon::ops {

enum class SimdLevel { baseline, avx2, avx512 };

// What this processor runs; MEGALODON_SIMD=baseline|avx2 in the environment lowers it (for tests).
SimdLevel simd_level();

// How bfloat16 is best multiplied on it: widened to float32, in pairs (AVX512_BF16), by tiles (AMX). The
// latter two go with avx512; MEGALODON_SIMD=avx512 leaves out tiles.
enum class Bfloat16Products { widened, pairs, tiles };
Bfloat16Products bfloat16_products();

// Whether Intel's MKL, which multiplies float32 for torch, leaves out the AVX-512 that the processor has.
bool mkl_takes_avx2();

}  // namespace megalodon::ops
